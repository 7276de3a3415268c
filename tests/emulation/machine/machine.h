// The machine that runs kernels on the CPU: one block of a grid after another, a block's threads as fibers that run
// until they have to wait for one another. It is made to show mistakes, not to be fast:
//   - shared memory holds NaN where nothing was written, and accesses outside it or at a wrong alignment are errors;
//   - copies that a kernel does not wait for arrive as late as they can, so what is read too early is not there yet;
//   - accesses of shared memory by two threads that no barrier keeps in order are an error where they are single
//     instructions; and threads that nothing keeps in order run in another order from block to block;
//   - threads that wait for others that never come are an error, not a hang.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// What lanes of a warp do together: called once, with what each lane of the mask brings.
using Together = void (*)(void* const* lanes, unsigned mask);

struct Warp {
  void* brought[32];
  unsigned running = 0;            // a bit for each lane that has not ended
  unsigned arrived = 0, mask = 0;  // at the one place where lanes wait for others
  unsigned barriers = 0;           // that all its lanes have passed: its own and the block's
  Together together = nullptr;
  const char* name = nullptr;
};

// A copy under way, of a thread's group of that number.
struct ThreadCopy {
  uint32_t to;
  const void* from;
  int bytes;
  unsigned group;
};

struct TensorMap;

struct BoxStore {
  const TensorMap* map;
  uint32_t from;
  int place[4];
  unsigned group;
};

struct Thread {
  Index index;
  int lane = 0;
  Warp* warp = nullptr;
  bool ended = true;
  const char* waits_for = nullptr;
  std::vector<ThreadCopy> copies;
  std::vector<BoxStore> stores;
  unsigned copy_group = 0, store_group = 0;  // of the next copies
  unsigned fences = 0;                       // that made its writes visible to the copy engine
};

// The thread that runs. Everything below but run_grid is called by threads.
extern Thread* current;
extern Index thread_index, block_index, block_size, grid_size;

// Ends the launch with an error of this text.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// Waits for the lanes of `mask`; the last to come calls `together`. All have to come for the same.
void meet_lanes(unsigned mask, const char* name, void* brought, Together together);
// Waits for all threads of the block that have not ended; returns whether one brought true.
bool meet_block(const char* name, bool brought);

// Type-safe: `together(lanes, mask)` gets the lanes' `brought` by address.
template <typename Brought>
void meet(unsigned mask, const char* name, Brought& brought, void (*together)(Brought* const* lanes, unsigned mask)) {
  meet_lanes(mask, name, &brought, reinterpret_cast<Together>(together));
}

// ------------------------------------------------------------------------------------------------------------- memory

// Shared memory is addressed from here on, as on devices that keep the first bytes for themselves: an address of 0 is
// one outside.
constexpr uint32_t kSharedBegin = 1024;
constexpr int kMostSharedBytes = (__CUDA_ARCH__ >= 900 ? 227 : 99) * 1024;  // of a block

// `bytes` of shared memory at an address, which must be a multiple of `alignment`; to be read or written by a thread.
char* shared(uint32_t address, int bytes, int alignment);
const char* shared_to_read(uint32_t address, int bytes, int alignment, const Thread& by = *current);
char* shared_to_write(uint32_t address, int bytes, int alignment, const Thread& by = *current);
uint32_t shared_address(const void* pointer);

char* dynamic_shared(int alignment);
// The block's variable that `site` stands for: `extern __shared__` aside, a __shared__ variable of `bytes`.
void* static_shared(int site, int bytes, int alignment);

// `pointer`, if an access of so many bytes is aligned and lies in what the caller of the library announced.
const void* global(const void* pointer, int bytes, int alignment);
inline void* global(void* pointer, int bytes, int alignment) {
  return const_cast<void*>(global(static_cast<const void*>(pointer), bytes, alignment));
}

// ------------------------------------------------------------------------------------------------- copies and barriers

void begin_copy(uint32_t to, const void* from, int bytes);  // 16 bytes, the last of them zeros
void commit_copies();
void wait_for_copies(int pending);

void init_barrier(uint32_t barrier, int arrivals);
void arrive_and_expect(uint32_t barrier, int bytes);
// Waits until the phase of this parity is complete.
void wait_for_barrier(uint32_t barrier, uint32_t parity);

// A tensor of at most four dimensions, the innermost first, and the boxes of it that are copied.
struct TensorMap {
  char* first;
  int value_bytes, swizzle_bytes;  // 0: the chunks lie in order
  int64_t size[4], stride[4];      // strides in bytes
  int box[4];
};
void begin_box_load(uint32_t to, const TensorMap& map, const int (&place)[4], uint32_t barrier);
void begin_box_store(const TensorMap& map, uint32_t from, const int (&place)[4]);
void commit_stores();
void wait_for_stores(int pending);
void copy_box(const TensorMap& map, uint32_t memory, const int (&place)[4], bool load);  // boxes.cpp

// -------------------------------------------------------------------------------------------------------------- grids

struct Grid {
  Index blocks, threads;
  size_t shared_bytes;
};
// Runs a grid; returns false where a thread failed, and last_failure() says why.
bool run_grid(const Grid& grid, void (*thread)(const void*), const void* argument);
const char* last_failure();

}  // namespace emulation
