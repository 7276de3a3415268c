// Backward: one pass over the samples gives, for each corner, the product of grad_output with the input there (from
// which the gradients of offsets and mask follow) and adds weight * grad_output to the input gradient.

// dots[4 * s + c]: grad_output of the pixel times the input at corner c of sample s, summed over channels.
struct Dots {
  alignas(64) float value[4 * kMaxSamples];
};

template <class T, int L, int V, bool kDots, bool kScatter>
void backward_chunk(const Block& b, int taps, int channel, const T* grad_output, int64_t stride, Dots& dots) {
  for (int pixel = 0; pixel < b.pixels; ++pixel) {
    Vec<L> grad[V];
    for (int v = 0; v < V; ++v) grad[v] = load<L>(grad_output + pixel * stride + channel + v * L);
    const int end = (pixel + 1) * taps;
    for (int s = pixel * taps; s < end; ++s) {
      if constexpr (kDots) {
        Vec<L> dot[4];
        for (int c = 0; c < 4; ++c) {
          const T* source = reinterpret_cast<const T*>(b.source[c][s]) + channel;
          dot[c] = grad[0] * load<L>(source);
          for (int v = 1; v < V; ++v) dot[c] += grad[v] * load<L>(source + v * L);
        }
        add_sums<L>(dots.value + 4 * s, dot[0], dot[1], dot[2], dot[3]);
      }
      if constexpr (kScatter) {
        for (int c = 0; c < 4; ++c) {
          float* target = reinterpret_cast<float*>(b.target[c][s]) + channel;
          const Vec<L> weight = splat<L>(b.weight[c][s]);
          for (int v = 0; v < V; ++v) store<L>(target + v * L, load<L>(target + v * L) + weight * grad[v]);
        }
      }
    }
  }
}

template <class T>
using BackwardChunk = void (*)(const Block&, int taps, int channel, const T* grad_output, int64_t stride, Dots& dots);

// The widest kernel for `channels` more channels; `taken` says how many of them it does.
template <class T, bool kDots, bool kScatter>
BackwardChunk<T> backward_chunk_for(int channels, int& taken) {
  constexpr int L = DCNGEN_DOT_LANES;
  const int vectors = channels / L >= 8 ? 8 : channels / L < 4 ? channels / L : 4;
  taken = vectors * L;
  switch (vectors) {
    case 8: return backward_chunk<T, L, 8, kDots, kScatter>;
    case 4: return backward_chunk<T, L, 4, kDots, kScatter>;
    case 3: return backward_chunk<T, L, 3, kDots, kScatter>;
    case 2: return backward_chunk<T, L, 2, kDots, kScatter>;
    case 1: return backward_chunk<T, L, 1, kDots, kScatter>;
  }
  if constexpr (L > 4) {
    taken = 4;
    if (channels >= 4) return backward_chunk<T, 4, 1, kDots, kScatter>;
  }
  taken = 1;
  return backward_chunk<T, 1, 1, kDots, kScatter>;
}

template <class T, bool kDots, bool kScatter>
void backward_block(const Block& b, int taps, int channels, const T* grad_output, int64_t stride, Dots& dots) {
  int taken = 0;
  for (int channel = 0; channel < channels; channel += taken) {
    const BackwardChunk<T> run = backward_chunk_for<T, kDots, kScatter>(channels - channel, taken);
    run(b, taps, channel, grad_output, stride, dots);
  }
}

// The gradients of one sample from its dots; `mask` is the gradient of the mask after softmax.
struct SampleGrad {
  float x, y, mask;
};

inline SampleGrad grad_of_sample(const Block& b, int s, const float* dot, float scale) {
  if (!b.counts[s]) return {0.f, 0.f, 0.f};
  const float lx = b.x[s], ly = b.y[s];
  const float top = dot[1] - dot[0], bottom = dot[3] - dot[2];  // times d(bilinear)/dx in the two rows
  const float upper = dot[0] + lx * top, lower = dot[2] + lx * bottom;
  const float factor = scale * b.mask[s];
  return {factor * (top + ly * (bottom - top)), factor * (lower - upper), upper + ly * (lower - upper)};
}

// Writes grad_offset_mask of a block.
template <class T>
void write_place_grads(const Problem& q, const Block& b, const Dots& dots, T* to) {
  const int taps = q.taps;
  float grads[3 * kMaxSamples];
  for (int pixel = 0; pixel < b.pixels; ++pixel, to += q.p.grad_offset_mask_pixel_stride) {
    float* mask_grads = grads + 2 * taps;
    for (int k = 0, s = pixel * taps; k < taps; ++k, ++s) {
      const SampleGrad grad = grad_of_sample(b, s, dots.value + 4 * s, q.p.offset_scale);
      grads[2 * k] = grad.x;
      grads[2 * k + 1] = grad.y;
      mask_grads[k] = grad.mask;
    }
    if (q.p.softmax) {
      const float* weights = b.mask + pixel * taps;
      float mean = 0.f;
      for (int k = 0; k < taps; ++k) mean += weights[k] * mask_grads[k];
      for (int k = 0; k < taps; ++k) mask_grads[k] = weights[k] * (mask_grads[k] - mean);
    }
    convert(to, grads, 3 * taps);
  }
}

// The padding channels behind the last group get zeros.
template <class T>
void clear_padding(const Problem& q, T* row_begin) {
  const auto& p = q.p;
  const float zero = 0.f;
  for (int64_t x = 0; x < p.width_out; ++x) {
    T* pixel = row_begin + x * p.grad_offset_mask_pixel_stride;
    for (int c = 3 * q.taps * p.groups; c < p.offset_mask_channels; ++c) store<1>(pixel + c, zero);
  }
}

// Where the sums of the input gradient of one slice are kept: pixels of `channels` floats, one more at the end that
// takes what falls outside the image.
struct Slice {
  float* sums;
  int first_channel, channels;
};

// One output row of one group. slice: where the input gradient is summed (kScatter), nullptr otherwise.
template <class T, bool kDots, bool kScatter>
void backward_row(const Backward& b, const Row& row, const Slice* slice) {
  const Problem& q = *b.problem;
  const auto& p = q.p;
  const int64_t line = (row.image * p.height_out + row.y) * p.width_out;
  const int first_channel = kScatter ? slice->first_channel : 0;
  const int channels = kScatter ? slice->channels : p.group_channels;
  const T* input = group_of<T>(p, b.input, row.image, row.group);
  const T* grad_output = static_cast<const T*>(b.grad_output) + line * p.output_pixel_stride +
                         int64_t{row.group} * p.group_channels + first_channel;
  T* grad_line = static_cast<T*>(b.grad_offset_mask) + line * p.grad_offset_mask_pixel_stride;
  Block block;
  Dots dots;
  for_each_block(q, [&](int64_t x, int pixels) {
    find_places<T>(q, b.offset_mask, row, x, pixels, block);
    if constexpr (kDots) {
      resolve(block, input, p.input_pixel_stride * int64_t{sizeof(T)}, b.zeros, block.source);
      for (int i = 0; i < 4 * block.samples; ++i) dots.value[i] = 0.f;
    }
    if constexpr (kScatter) {
      const int64_t stride = channels * int64_t{sizeof(float)};
      const int64_t pixels_in = p.height_in * p.width_in;
      resolve(block, slice->sums, stride, slice->sums + pixels_in * channels, block.target);
    }
    backward_block<T, kDots, kScatter>(block, q.taps, channels, grad_output + x * p.output_pixel_stride,
                                       p.output_pixel_stride, dots);
    if constexpr (kDots) {
      write_place_grads(q, block, dots,
                        grad_line + x * p.grad_offset_mask_pixel_stride + int64_t{3} * q.taps * row.group);
    }
  });
  if constexpr (kDots) {
    if (row.group == p.groups - 1) clear_padding(q, grad_line);
  }
}

template <class T>
void backward_rows(const Backward& b, int64_t first_row, int64_t last_row) {
  for (int64_t r = first_row; r < last_row; ++r) {
    backward_row<T, true, false>(b, row_of(b.problem->p, r), nullptr);
  }
}

template <class T>
void backward_slices(const Backward& b, int64_t first_slice, int64_t last_slice, float* scratch, bool with_places) {
  const auto& p = b.problem->p;
  const int64_t pixels_in = p.height_in * p.width_in;
  for (int64_t index = first_slice; index < last_slice; ++index) {
    const int part = static_cast<int>(index % b.slices_per_group);
    const int64_t unit = index / b.slices_per_group;
    const int first = part * b.slice_channels, rest = p.group_channels - first;
    const Slice slice{scratch, first, rest < b.slice_channels ? rest : b.slice_channels};
    Row row{unit / p.groups, 0, static_cast<int>(unit % p.groups)};

    __builtin_memset(slice.sums, 0, static_cast<size_t>(pixels_in + 1) * slice.channels * sizeof(float));
    for (row.y = 0; row.y < p.height_out; ++row.y) {
      if (with_places) {
        backward_row<T, true, true>(b, row, &slice);
      } else {
        backward_row<T, false, true>(b, row, &slice);
      }
    }
    T* to = static_cast<T*>(b.grad_input) + row.image * pixels_in * p.grad_input_pixel_stride +
            int64_t{row.group} * p.group_channels + first;
    for (int64_t pixel = 0; pixel < pixels_in; ++pixel) {
      convert(to + pixel * p.grad_input_pixel_stride, slice.sums + pixel * slice.channels, slice.channels);
    }
  }
}
