// What the bulk copy engine does with one box of a tensor.
#include <cstring>

#include "machine.h"

namespace emulation {
namespace {

// Where the copy engine puts the 16 bytes of an address: it permutes the chunks of a row of 32, 64 or 128 bytes by the
// bits of the address above bit 6.
uint32_t swizzled(uint32_t address, int swizzle_bytes) {
  if (swizzle_bytes == 0) return address;
  const uint32_t chunks = static_cast<uint32_t>(swizzle_bytes) / 16 - 1;
  return address ^ ((address >> 7 & chunks) << 4);
}

}  // namespace

void copy_box(const TensorMap& map, uint32_t memory, const int (&place)[4], bool load) {
  const int row_bytes = map.box[0] * map.value_bytes;
  if (memory % 128 != 0) fail("the copy engine at shared address %u, not a multiple of 128", memory);
  uint32_t at = memory;
  int index[4] = {};
  for (index[3] = 0; index[3] < map.box[3]; ++index[3]) {
    for (index[2] = 0; index[2] < map.box[2]; ++index[2]) {
      for (index[1] = 0; index[1] < map.box[1]; ++index[1], at += row_bytes) {
        bool row_inside = true;
        char* row = map.first;
        for (int i = 1; i < 4; ++i) {
          const int64_t from = int64_t{place[i]} + index[i];
          row_inside = row_inside && from >= 0 && from < map.size[i];
          row += from * map.stride[i];
        }
        for (int value = 0; value < map.box[0]; ++value) {
          const uint32_t plain = at + value * map.value_bytes;
          char* const own = shared(swizzled(plain, map.swizzle_bytes), map.value_bytes, map.value_bytes);
          const int64_t column = int64_t{place[0]} + value;
          const bool inside = row_inside && column >= 0 && column < map.size[0];
          char* const other = row + column * map.value_bytes;
          if (inside) global(other, map.value_bytes, map.value_bytes);
          if (load && inside) std::memcpy(own, other, map.value_bytes);
          if (load && !inside) std::memset(own, 0, map.value_bytes);
          if (!load && inside) std::memcpy(other, own, map.value_bytes);
        }
      }
    }
  }
}

}  // namespace emulation
