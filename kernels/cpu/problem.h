// What api.cpp and the kernels of each instruction set agree on.
//
// Everything here is plain data: the kernels are compiled several times with different flags, so a shared inline
// function could end up, through the linker, with instructions that the running machine lacks.
#pragma once

#include <cstdint>

#include "dcngen_kernels.h"

namespace dcngen_cpu {

// Samples (output pixel x tap) whose places are worked out together, hence also the most taps a kernel may have.
// 16 pixels of a 3x3 kernel: large enough to amortise, small enough for the first-level cache.
constexpr int kMaxSamples = 144;

// Channels of the input gradient are shared out in multiples of this, so that no vector is cut.
constexpr int kChannelQuantum = 8;

// One call, checked, with what follows from its parameters.
struct Problem {
  dcngen_dcnv4_params p;
  int taps;
  int origin_x, origin_y;    // where the middle of the kernel of output (0, 0) lies in the input
  int64_t padded_width;      // of a padded image (places.inl), in pixels
  int64_t padded_pixels;
  float grid_x[kMaxSamples];  // the taps' places around the middle, before offset_scale
  float grid_y[kMaxSamples];
};

struct Forward {
  const Problem* problem;
  const void* input;
  const void* offset_mask;
  void* output;
  const float* images;  // the padded images of all units, or nullptr: each is then made in the scratch
};

struct Backward {
  const Problem* problem;
  const void* grad_output;
  const void* input;
  const void* offset_mask;
  void* grad_input;
  void* grad_offset_mask;
  const float* images;  // for backward_places
  // The input gradient is formed slice by slice; one slice is one image, one group and `slice_channels` of its
  // channels (the last slice of a group may have fewer).
  int slices_per_group;
  int slice_channels;
};

// The kernels of one instruction set. A unit is one group of one image, n * groups + g; a row one output row of a unit,
// unit * height_out + oh; a slice is unit * slices_per_group + part. Ranges are half open. No two rows or slices write
// the same element, and each result is the same whichever range it is computed in.
struct Kernels {
  const char* name;
  // Padded images, padded_pixels * group_channels floats a unit. Line unit * (height_in + 1) + y is row y of the input;
  // with y == height_in it is the zeros above and below.
  void (*pad)(const Problem&, const void* input, float* images, int64_t first_line, int64_t last_line);
  // scratch: one padded image, used where f.images is nullptr.
  void (*forward)(const Forward& f, int64_t first_row, int64_t last_row, float* scratch);
  // grad_offset_mask alone.
  void (*backward_places)(const Backward&, int64_t first_row, int64_t last_row);
  // grad_input, summed in `scratch` (padded_pixels * slice_channels floats, any contents) and rounded once;
  // with_places: grad_offset_mask as well, which needs slices_per_group == 1 and twice the scratch (the padded input).
  void (*backward_slices)(const Backward&, int64_t first_slice, int64_t last_slice, float* scratch, bool with_places);
};

extern const Kernels kBaselineKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;

}  // namespace dcngen_cpu
