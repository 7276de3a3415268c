// The C entry points: check the parameters, choose the instruction set, share out the work.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "problem.h"
#include "threads.h"

namespace dcngen_cpu {
namespace {

thread_local std::string last_error;

int fail(const std::string& message) {
  last_error = message;
  return 1;
}

// DCNGEN_CPU_ISA=baseline or avx2 in the environment forbids the wider sets: for tests and for comparing.
const Kernels& choose_kernels() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("DCNGEN_CPU_ISA");
  const std::string most = wanted ? wanted : "avx512";
  __builtin_cpu_init();
  // Every processor with AVX2 and FMA has F16C too.
  const bool avx2 = most != "baseline" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && most != "avx2" && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) return kAvx512Kernels;
  if (avx2) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

// --- checks ---

void require(bool holds, const char* expected, int64_t got) {
  if (!holds) throw std::string("expected ") + expected + ", got " + std::to_string(got);
}

int64_t output_size(int64_t size, int pad, int dilation, int kernel, int stride) {
  const int64_t room = size + 2 * int64_t{pad} - (int64_t{dilation} * (kernel - 1) + 1);
  return room < 0 ? 0 : room / stride + 1;
}

void check_sizes(const dcngen_dcnv4_params& p, int taps) {
  // Within one image, coordinates and pixel indices are 32-bit integers; the batch has no limit.
  constexpr int64_t kMaxSide = 1 << 29, kMaxPixels = 1 << 30;
  require(p.dtype >= DCNGEN_FLOAT32 && p.dtype <= DCNGEN_BFLOAT16, "a dcngen_dtype", p.dtype);
  require(p.batch >= 0, "batch of at least 0", p.batch);
  require(p.groups >= 1, "groups of at least 1", p.groups);
  require(p.group_channels >= 1, "group_channels of at least 1", p.group_channels);
  for (int64_t side : {p.height_in, p.width_in, p.height_out, p.width_out}) {
    require(side >= 0 && side <= kMaxSide, "heights and widths of 0 to 2^29", side);
  }
  require(p.height_in * p.width_in <= kMaxPixels, "input images of at most 2^30 pixels", p.height_in * p.width_in);
  for (int size : {p.kernel_h, p.kernel_w, p.stride_h, p.stride_w, p.dilation_h, p.dilation_w}) {
    require(size >= 1 && size < 1 << 20, "kernel sizes, strides and dilations of at least 1 and less than 2^20", size);
  }
  for (int pad : {p.pad_h, p.pad_w}) {
    require(pad >= 0 && pad < 1 << 20, "padding of at least 0 and less than 2^20", pad);
  }
  require(int64_t{p.kernel_h} * p.kernel_w <= kMaxSamples, "at most 144 taps", int64_t{p.kernel_h} * p.kernel_w);
  require(taps >= 1, "at least 1 tap", taps);
  require(p.height_out == output_size(p.height_in, p.pad_h, p.dilation_h, p.kernel_h, p.stride_h),
          "height_out = (height_in + 2 * pad - (dilation * (kernel - 1) + 1)) / stride + 1", p.height_out);
  require(p.width_out == output_size(p.width_in, p.pad_w, p.dilation_w, p.kernel_w, p.stride_w),
          "width_out = (width_in + 2 * pad - (dilation * (kernel - 1) + 1)) / stride + 1", p.width_out);
}

void check_strides(const dcngen_dcnv4_params& p, int taps, bool backward) {
  const int64_t channels = int64_t{p.groups} * p.group_channels, least = int64_t{3} * p.groups * taps;
  require(p.offset_mask_channels >= least, "offset_mask_channels of at least 3 * groups * taps",
          p.offset_mask_channels);
  require(p.input_pixel_stride >= channels, "input_pixel_stride of at least the channels", p.input_pixel_stride);
  require(p.output_pixel_stride >= channels, "output_pixel_stride of at least the channels", p.output_pixel_stride);
  require(p.offset_mask_pixel_stride >= least, "offset_mask_pixel_stride of at least 3 * groups * taps",
          p.offset_mask_pixel_stride);
  if (!backward) return;
  require(p.grad_input_pixel_stride >= channels, "grad_input_pixel_stride of at least the channels",
          p.grad_input_pixel_stride);
  require(p.grad_offset_mask_pixel_stride >= p.offset_mask_channels,
          "grad_offset_mask_pixel_stride of at least offset_mask_channels", p.grad_offset_mask_pixel_stride);
}

Problem make_problem(const dcngen_dcnv4_params* params, bool backward) {
  if (!params) throw std::string("expected params, got a null pointer");
  Problem q{};
  q.p = *params;
  const auto& p = q.p;
  const bool remove = p.remove_center && p.kernel_h % 2 && p.kernel_w % 2;
  if (p.remove_center && !remove) throw std::string("expected odd kernel sizes with remove_center");
  q.taps = p.kernel_h * p.kernel_w - (remove ? 1 : 0);
  check_sizes(p, q.taps);
  check_strides(p, q.taps, backward);

  const int center_x = p.dilation_w * (p.kernel_w - 1) / 2, center_y = p.dilation_h * (p.kernel_h - 1) / 2;
  q.origin_x = center_x - p.pad_w;
  q.origin_y = center_y - p.pad_h;
  q.padded_width = p.width_in + 1;
  q.padded_pixels = (p.height_in + 2) * q.padded_width + 2;
  int k = 0;
  for (int i = 0; i < p.kernel_w; ++i) {
    for (int j = 0; j < p.kernel_h; ++j) {
      if (remove && i == p.kernel_w / 2 && j == p.kernel_h / 2) continue;
      q.grid_x[k] = static_cast<float>(i * p.dilation_w - center_x);
      q.grid_y[k] = static_cast<float>(j * p.dilation_h - center_y);
      ++k;
    }
  }
  return q;
}

// Runs a call; whatever goes wrong becomes a message for this thread.
template <class Call>
int guarded(const char* name, Call call) {
  try {
    call();
    return 0;
  } catch (const std::string& message) {
    return fail(std::string(name) + ": " + message);
  } catch (const std::bad_alloc&) {
    return fail(std::string(name) + ": out of memory for the scratch buffers; use fewer threads or a smaller map");
  } catch (const std::exception& error) {
    return fail(std::string(name) + ": " + error.what());
  }
}

// --- the work ---

constexpr int64_t kUnitsPerThread = 4;  // with so many images and groups a thread, their shares come out even enough

// Multiply-adds of one pass over all samples, with the cost of finding the places counted as 16 channels.
double work_of(const Problem& q) {
  const auto& p = q.p;
  return static_cast<double>(p.batch) * static_cast<double>(p.height_out * p.width_out) * p.groups * q.taps * 4.0 *
         (p.group_channels + 16.0);
}

// Uninitialised floats on a cache line's boundary, so that no vector of a padded image is split between two.
class Floats {
 public:
  explicit Floats(int64_t count)
      : data_(static_cast<float*>(::operator new(static_cast<size_t>(count) * sizeof(float), kAlignment))) {}
  Floats(Floats&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  ~Floats() { ::operator delete(data_, kAlignment); }
  float* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  float* data_;
};

std::vector<Floats> scratch_for(const Threads& threads, int64_t floats) {
  std::vector<Floats> scratch;
  for (int i = 0; i < threads.useful; ++i) scratch.emplace_back(floats);
  return scratch;
}

int64_t units_of(const Problem& q) { return q.p.batch * q.p.groups; }

int64_t rows_of(const Problem& q) { return units_of(q) * q.p.height_out; }

// The padded images of all units.
Floats padded_images(const Problem& q, const void* input, const Threads& threads) {
  Floats images(units_of(q) * q.padded_pixels * q.p.group_channels);
  share_out(units_of(q) * (q.p.height_in + 1), threads, [&](int, int64_t first, int64_t last) {
    kernels().pad(q, input, images.data(), first, last);
  });
  return images;
}

// Where there are enough units for the threads, a thread takes whole ones, each padded as it comes; otherwise all are
// padded first, and the rows shared out.
void run_forward(const Problem& q, Forward f, int num_threads) {
  const auto& p = q.p;
  f.problem = &q;
  Threads threads = threads_for(work_of(q), num_threads);
  if (units_of(q) < kUnitsPerThread * threads.useful && threads.useful > 1) {
    const Floats images = padded_images(q, f.input, threads);
    f.images = images.data();
    share_out(rows_of(q), threads, [&](int, int64_t first, int64_t last) {
      kernels().forward(f, first, last, nullptr);
    });
    return;
  }
  const std::vector<Floats> scratch = scratch_for(threads, q.padded_pixels * p.group_channels);
  share_out(units_of(q), threads, [&](int worker, int64_t first, int64_t last) {
    kernels().forward(f, first * p.height_out, last * p.height_out, scratch[static_cast<size_t>(worker)].data());
  });
}

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Into how many slices to cut each group's channels. One, with all gradients in one pass, where there are enough images
// and groups for the threads; otherwise the places are found twice, the offset gradients shared out by rows and the
// input gradient by channels. Sums are taken in the same order either way.
int choose_slices(const Problem& q, int threads) {
  const int64_t units = units_of(q);
  const int most = ceil_div(q.p.group_channels, kChannelQuantum);
  if (units >= kUnitsPerThread * threads || most == 1 || units == 0) return 1;
  const int cut = static_cast<int>(std::min<int64_t>(most, ceil_div(threads, units)));
  constexpr double kSplitCost = 0.65;  // of each of the two passes, the single pass being 1
  const double whole = ceil_div(units, threads);
  const double split = kSplitCost * (static_cast<double>(units) / threads +
                                     static_cast<double>(ceil_div(units * cut, threads)) / cut);
  return split < whole ? cut : 1;
}

void run_backward(const Problem& q, Backward b, int num_threads) {
  const auto& p = q.p;
  b.problem = &q;
  Threads threads = threads_for(2 * work_of(q), num_threads);
  const int cut = choose_slices(q, threads.useful);
  const int quanta = ceil_div(p.group_channels, kChannelQuantum);
  b.slice_channels = cut == 1 ? p.group_channels : ceil_div(quanta, cut) * kChannelQuantum;
  b.slices_per_group = ceil_div(p.group_channels, b.slice_channels);
  const bool whole = b.slices_per_group == 1;

  if (!whole) {
    const Floats images = padded_images(q, b.input, threads);
    b.images = images.data();
    share_out(rows_of(q), threads, [&](int, int64_t first, int64_t last) {
      kernels().backward_places(b, first, last);
    });
  }
  const int64_t slices = units_of(q) * b.slices_per_group;
  threads.useful = static_cast<int>(std::min<int64_t>(threads.useful, slices));
  const std::vector<Floats> scratch = scratch_for(threads, q.padded_pixels * b.slice_channels * (whole ? 2 : 1));
  share_out(slices, threads, [&](int worker, int64_t first, int64_t last) {
    kernels().backward_slices(b, first, last, scratch[static_cast<size_t>(worker)].data(), whole);
  });
}

}  // namespace
}  // namespace dcngen_cpu

using namespace dcngen_cpu;

extern "C" {

int dcngen_cpu_abi_version(void) { return DCNGEN_ABI_VERSION; }

const char* dcngen_cpu_last_error(void) { return last_error.c_str(); }

const char* dcngen_cpu_isa(void) { return kernels().name; }

int dcngen_cpu_dcnv4_forward(const dcngen_dcnv4_params* params, const void* input, const void* offset_mask,
                             void* output, int num_threads) {
  return guarded("dcnv4 forward", [&] {
    const Problem q = make_problem(params, false);
    run_forward(q, {nullptr, input, offset_mask, output, nullptr}, num_threads);
  });
}

int dcngen_cpu_dcnv4_backward(const dcngen_dcnv4_params* params, const void* grad_output, const void* input,
                              const void* offset_mask, void* grad_input, void* grad_offset_mask, int num_threads) {
  return guarded("dcnv4 backward", [&] {
    const Problem q = make_problem(params, true);
    run_backward(q, {nullptr, grad_output, input, offset_mask, grad_input, grad_offset_mask, nullptr, 1, 1},
                 num_threads);
  });
}

}  // extern "C"
