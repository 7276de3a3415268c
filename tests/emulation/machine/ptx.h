// The instructions of the kernels' asm statements, one function each: ../translate.py makes calls of them, the name
// being the mnemonic with _ for its dots and colons, the arguments its operands from left to right. A kernel that uses
// an instruction that is not here does not compile for the emulation.
#pragma once

#include "machine.h"
#include "numbers.h"

namespace emulation::ptx {

constexpr unsigned kAll = 0xffffffffu;

// ---------------------------------------------------------------------------------------------------- order of kernels

inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() {}  // a grid begins when the one before has ended

// ------------------------------------------------------------------------------------------------------------- memory

inline void ld_shared_b16(uint16_t& v, uint32_t from) { std::memcpy(&v, shared_to_read(from, 2, 2), 2); }
inline void ld_shared_b32(uint32_t& v, uint32_t from) { std::memcpy(&v, shared_to_read(from, 4, 4), 4); }
inline void ld_shared_f32(float& v, uint32_t from) { std::memcpy(&v, shared_to_read(from, 4, 4), 4); }
template <typename T>
void load_four(T& a, T& b, T& c, T& d, const void* from) {
  static_assert(sizeof(T) == 4, "");
  const T* const values = static_cast<const T*>(from);
  a = values[0], b = values[1], c = values[2], d = values[3];
}
template <typename T>
void store_four(void* to, T a, T b, T c, T d) {
  T* const values = static_cast<T*>(to);
  values[0] = a, values[1] = b, values[2] = c, values[3] = d;
}
inline void ld_shared_v4_b32(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t from) {
  load_four(a, b, c, d, shared_to_read(from, 16, 16));
}
inline void ld_shared_v4_f32(float& a, float& b, float& c, float& d, uint32_t from) {
  load_four(a, b, c, d, shared_to_read(from, 16, 16));
}
inline void st_shared_b16(uint32_t to, uint16_t v) { std::memcpy(shared_to_write(to, 2, 2), &v, 2); }
inline void st_shared_b32(uint32_t to, uint32_t v) { std::memcpy(shared_to_write(to, 4, 4), &v, 4); }
inline void st_shared_v2_b32(uint32_t to, uint32_t a, uint32_t b) {
  const uint32_t values[2] = {a, b};
  std::memcpy(shared_to_write(to, 8, 8), values, 8);
}
inline void st_shared_v4_b32(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_four(shared_to_write(to, 16, 16), a, b, c, d);
}
inline void ld_global_nc_v4_b32(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* from) {
  load_four(a, b, c, d, global(from, 16, 16));
}
inline void st_global_v4_b32(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_four(global(to, 16, 16), a, b, c, d);
}

template <typename Add>
void add_words(void* to, const uint32_t (&words)[4], Add add) {
  uint32_t* const values = static_cast<uint32_t*>(global(to, 16, 16));
  for (int i = 0; i < 4; ++i) values[i] = add(values[i], words[i]);
}
inline void red_global_add_noftz_v4_f16x2(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  add_words(to, {a, b, c, d}, [](uint32_t x, uint32_t y) {
    return half_pair(half_float(x) + half_float(y), half_float(x >> 16) + half_float(y >> 16));
  });
}
inline void red_global_add_noftz_v4_bf16x2(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  add_words(to, {a, b, c, d}, [](uint32_t x, uint32_t y) {
    return bfloat_pair(bfloat_float(x) + bfloat_float(y), bfloat_float(x >> 16) + bfloat_float(y >> 16));
  });
}
inline void red_global_add_v4_f32(void* to, float a, float b, float c, float d) {
  add_words(to, {float_bits(a), float_bits(b), float_bits(c), float_bits(d)},
            [](uint32_t x, uint32_t y) { return float_bits(bits_float(x) + bits_float(y)); });
}

template <typename To, typename From>
void mad_wide_u32(To*& sum, uint32_t a, uint32_t b, From* c) {
  sum = reinterpret_cast<To*>(reinterpret_cast<uintptr_t>(c) + uint64_t{a} * b);
}

inline void setp_ne_b32(bool& result, int a, int b) { result = a != b; }

// ------------------------------------------------------------------------------------------------------------- copies

inline void cp_async_cg_shared_global(uint32_t to, const void* from, int, int bytes) { begin_copy(to, from, bytes); }
inline void cp_async_commit_group() { commit_copies(); }
inline void cp_async_wait_group(int pending) { wait_for_copies(pending); }

inline void mbarrier_init_shared_cta_b64(uint32_t barrier, int arrivals) { init_barrier(barrier, arrivals); }
inline void fence_mbarrier_init_release_cluster() {}
inline void mbarrier_arrive_expect_tx_shared_cta_b64(uint32_t barrier, int bytes) { arrive_and_expect(barrier, bytes); }
inline void mbarrier_try_wait_parity_shared_cta_b64(bool& done, uint32_t barrier, uint32_t parity) {
  wait_for_barrier(barrier, parity);
  done = true;
}
inline void cp_async_bulk_tensor_4d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(
    uint32_t to, const TensorMap* map, int channel, int x, int y, int image, uint32_t barrier) {
  begin_box_load(to, *map, {channel, x, y, image}, barrier);
}
inline void fence_proxy_async_shared_cta() { ++current->fences; }
inline void cp_async_bulk_tensor_4d_global_shared_cta_tile_bulk_group(const TensorMap* map, int channel, int x, int y,
                                                                      int image, uint32_t from) {
  begin_box_store(*map, from, {channel, x, y, image});
}
inline void cp_async_bulk_commit_group() { commit_stores(); }
inline void cp_async_bulk_wait_group_read(int pending) { wait_for_stores(pending); }
inline void cp_async_bulk_wait_group(int pending) { wait_for_stores(pending); }

// ----------------------------------------------------------------------------------------------------------- matrices

// What a lane brings to a load or store of 8x8 matrices: its registers, one of each matrix, and a row's address.
struct MatrixRows {
  uint32_t* registers[4];
  uint32_t row;
  const Thread* lane = current;
};

void load_matrices(MatrixRows* const* lanes, unsigned);             // matrices.cpp
void load_matrices_transposed(MatrixRows* const* lanes, unsigned);
void store_four_matrices(MatrixRows* const* lanes, unsigned);
void store_two_matrices(MatrixRows* const* lanes, unsigned);

inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t row) {
  MatrixRows own = {{&a, &b, &c, &d}, row};
  meet(kAll, "ldmatrix", own, load_matrices);
}
inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d,
                                                           uint32_t row) {
  MatrixRows own = {{&a, &b, &c, &d}, row};
  meet(kAll, "ldmatrix.trans", own, load_matrices_transposed);
}
inline void stmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  MatrixRows own = {{&a, &b, &c, &d}, row};
  meet(kAll, "stmatrix.x4", own, store_four_matrices);
}
inline void stmatrix_sync_aligned_m8n8_x2_shared_b16(uint32_t row, uint32_t a, uint32_t b) {
  MatrixRows own = {{&a, &b, nullptr, nullptr}, row};
  meet(kAll, "stmatrix.x2", own, store_two_matrices);
}

// A lane's parts of d = a * b + c.
struct Product {
  float* d[4];
  uint32_t a[4], b[2];
  float c[4];
};

void multiply_halves(Product* const* lanes, unsigned);  // matrices.cpp
void multiply_bfloats(Product* const* lanes, unsigned);

inline void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(float& d0, float& d1, float& d2, float& d3, uint32_t a0,
                                                              uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                                              uint32_t b1, float c0, float c1, float c2, float c3) {
  Product own = {{&d0, &d1, &d2, &d3}, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
  meet(kAll, "mma of halves", own, multiply_halves);
}
inline void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(float& d0, float& d1, float& d2, float& d3, uint32_t a0,
                                                                uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                                                uint32_t b1, float c0, float c1, float c2, float c3) {
  Product own = {{&d0, &d1, &d2, &d3}, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
  meet(kAll, "mma of bfloats", own, multiply_bfloats);
}

}  // namespace emulation::ptx
