// All kernels of one instruction set; included once by each isa_*.cpp.
//
// Everything sits in an unnamed namespace and nothing of the C++ library is used: see problem.h for why.
#include "problem.h"
#include "simd.inl"

namespace dcngen_cpu {
namespace {
#include "padded.inl"
#include "places.inl"
#include "forward.inl"
#include "backward.inl"

template <class Run>
void with_dtype(const Problem& problem, Run run) {
  switch (problem.p.dtype) {
    case DCNGEN_FLOAT16: return run(Half{});
    case DCNGEN_BFLOAT16: return run(Bfloat{});
    default: return run(float{});
  }
}

void pad_entry(const Problem& problem, const void* input, float* images, int64_t first, int64_t last) {
  with_dtype(problem, [&](auto t) { pad_lines<decltype(t)>(problem, input, images, first, last); });
}

void forward_entry(const Forward& f, int64_t first, int64_t last, float* scratch) {
  with_dtype(*f.problem, [&](auto t) { forward_rows<decltype(t)>(f, first, last, scratch); });
}

void backward_places_entry(const Backward& b, int64_t first, int64_t last) {
  with_dtype(*b.problem, [&](auto t) { backward_rows<decltype(t)>(b, first, last); });
}

void backward_slices_entry(const Backward& b, int64_t first, int64_t last, float* scratch, bool with_places) {
  with_dtype(*b.problem, [&](auto t) { backward_slices<decltype(t)>(b, first, last, scratch, with_places); });
}
}  // namespace

const Kernels DCNGEN_KERNELS = {DCNGEN_ISA_NAME, pad_entry, forward_entry, backward_places_entry,
                                backward_slices_entry};

}  // namespace dcngen_cpu
