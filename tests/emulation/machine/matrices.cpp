// Loads and stores of 8x8 matrices and their products, as the instructions spread them over the lanes of a warp.
#include "ptx.h"
#include "races.h"

namespace emulation::ptx {
namespace {

// Lane r + 8 * i gives the address of row r of matrix i. A row counts as an access of that lane, and each of its words
// as one of the lane whose register it is.
uint32_t word_of(MatrixRows* const* lanes, int matrix, int row, int word, int lane) {
  uint32_t value;
  std::memcpy(&value, shared_to_read(lanes[8 * matrix + row]->row + 4 * word, 4, 4, *lanes[lane]->lane), 4);
  return value;
}

void read_rows(MatrixRows* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) shared_to_read(lanes[lane]->row, 16, 16, *lanes[lane]->lane);
}

void store_matrices(MatrixRows* const* lanes, int count) {
  for (int lane = 0; lane < 8 * count; ++lane) {
    shared(lanes[lane]->row, 16, 16);
    races::will_write(lanes[lane]->row, 16, *lanes[lane]->lane);
  }
  for (int matrix = 0; matrix < count; ++matrix) {
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t address = lanes[8 * matrix + lane / 4]->row + 4 * (lane % 4);
      std::memcpy(shared_to_write(address, 4, 4, *lanes[lane]->lane), lanes[lane]->registers[matrix], 4);
    }
  }
}

// Lane l has of a (16 x 16) the pairs of rows l / 4 and 8 further down, of b (16 x 8) those of column l / 4.
template <typename ToFloat>
void multiply(Product* const* lanes, ToFloat to_float) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int outer = lane / 4, inner = 2 * (lane % 4);
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) {
        a[outer + 8 * (i % 2)][inner + 8 * (i / 2) + half] = to_float(lanes[lane]->a[i] >> 16 * half & 0xffff);
      }
      for (int i = 0; i < 2; ++i) b[inner + 8 * i + half][outer] = to_float(lanes[lane]->b[i] >> 16 * half & 0xffff);
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sums[8] = {};
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < 8; ++column) {
      Product& own = *lanes[4 * (row % 8) + column / 2];
      const int i = 2 * (row / 8) + column % 2;
      *own.d[i] = own.c[i] + sums[column];
    }
  }
}

}  // namespace

void load_matrices(MatrixRows* const* lanes, unsigned) {
  read_rows(lanes);
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int lane = 0; lane < 32; ++lane) {
      *lanes[lane]->registers[matrix] = word_of(lanes, matrix, lane / 4, lane % 4, lane);
    }
  }
}

void load_matrices_transposed(MatrixRows* const* lanes, unsigned) {
  read_rows(lanes);
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int lane = 0; lane < 32; ++lane) {
      const int column = lane / 4, row = 2 * (lane % 4);
      const auto value = [&](int of_row) {
        return word_of(lanes, matrix, of_row, column / 2, lane) >> 16 * (column % 2) & 0xffff;
      };
      *lanes[lane]->registers[matrix] = value(row) | value(row + 1) << 16;
    }
  }
}

void store_four_matrices(MatrixRows* const* lanes, unsigned) { store_matrices(lanes, 4); }
void store_two_matrices(MatrixRows* const* lanes, unsigned) { store_matrices(lanes, 2); }

void multiply_halves(Product* const* lanes, unsigned) { multiply(lanes, half_float); }
void multiply_bfloats(Product* const* lanes, unsigned) { multiply(lanes, bfloat_float); }

}  // namespace emulation::ptx
