// Loads and stores of 8x8 matrices and their products, as the instructions spread them over the lanes of a warp.
#include "ptx.h"

namespace emulation::ptx {
namespace {

// Lane l % 8 + 8 * i gives the address of row l of matrix i.
uint32_t* row_of(MatrixRows* const* lanes, int matrix, int row) {
  return reinterpret_cast<uint32_t*>(shared(lanes[8 * matrix + row]->row, 16, 16));
}

void store_matrices(MatrixRows* const* lanes, int count) {
  for (int matrix = 0; matrix < count; ++matrix) {
    for (int lane = 0; lane < 32; ++lane) row_of(lanes, matrix, lane / 4)[lane % 4] = *lanes[lane]->registers[matrix];
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
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int lane = 0; lane < 32; ++lane) *lanes[lane]->registers[matrix] = row_of(lanes, matrix, lane / 4)[lane % 4];
  }
}

void load_matrices_transposed(MatrixRows* const* lanes, unsigned) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int lane = 0; lane < 32; ++lane) {
      const int column = lane / 4, row = 2 * (lane % 4);
      const auto value = [&](int of_row) {
        return row_of(lanes, matrix, of_row)[column / 2] >> 16 * (column % 2) & 0xffff;
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
