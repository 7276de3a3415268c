// Backward: one pass over the samples gives, for each corner, the product of grad_output with the input there (from
// which the gradients of offsets and mask follow) and adds weight * grad_output to the input gradient.

// dots[4 * s + c]: grad_output of the pixel times the input at corner c of sample s, summed over channels.
struct Dots {
  alignas(64) float value[4 * kMaxSamples];
};

// What one pass over the samples of a block works on: padded images of `channels` floats a pixel, both from the pass's
// first channel on.
struct Slice {
  const float* input;
  float* sums;  // of the input gradient
  int64_t channels;
};

// The products of the pixel's grad_output with the input at the four corners of a sample; `next`: to the next pixel.
template <int L, int V>
[[gnu::always_inline]] inline Vec<4> corner_dots(const Vec<L> (&grad)[V], const float* top, const float* bottom,
                                                 int64_t next) {
  const float* const corner[4] = {top, top + next, bottom, bottom + next};
  Vec<L> dot[4];
  for (int c = 0; c < 4; ++c) {
    dot[c] = grad[0] * load<L>(corner[c]);
    for (int v = 1; v < V; ++v) dot[c] += grad[v] * load<L>(corner[c] + v * L);
  }
  return sums_of<L>(dot);
}

// L lanes for the dot products, W for the sums of the input gradient. kWhole: the slice has no other channels.
template <class T, int L, int V, bool kDots, bool kScatter, bool kWhole>
void backward_chunk(const Problem& q, const Block& b, const Slice& slice, const T* grad_output, bool add, Dots& dots) {
  constexpr int W = L * V % DCNGEN_WIDE_LANES == 0 ? DCNGEN_WIDE_LANES : L, kWide = L * V / W;
  // Copies, since a store of floats may change whatever is behind a pointer, as far as the compiler knows.
  const int64_t channels = kWhole ? L * V : slice.channels, line = q.padded_width * channels;
  const int64_t stride = q.p.output_pixel_stride;
  const float* const input = slice.input;
  float* const sums = slice.sums;
  const int taps = q.taps, samples = b.samples;
  for (int s = 0; s < samples; grad_output += stride) {
    prefetch<false>(grad_output, stride, V * L);
    Vec<L> grad[V];
    Vec<W> wide[kWide];
    for (int v = 0; v < V; ++v) grad[v] = load<L>(grad_output + v * L);
    for (int v = 0; v < kWide; ++v) wide[v] = load<W>(grad_output + v * W);
    for (const int end = s + taps; s < end; ++s) {
      const int64_t first = b.pixel[s] * channels;
      if constexpr (kDots) {
        Vec<4> products = corner_dots<L, V>(grad, input + first, input + first + line, channels);
        if (!kWhole && add) products += load<4>(dots.value + 4 * s);
        store<4>(dots.value + 4 * s, products);
      }
      if constexpr (kScatter) {
        float *const top = sums + first, *const bottom = top + line;
        float* const corner[4] = {top, top + channels, bottom, bottom + channels};
        for (int c = 0; c < 4; ++c) {
          const Vec<W> weight = splat<W>(b.weight[c][s]);
          for (int v = 0; v < kWide; ++v) {
            store<W>(corner[c] + v * W, load<W>(corner[c] + v * W) + weight * wide[v]);
          }
        }
      }
    }
  }
}

// add: to the products of earlier channels.
template <class T>
using BackwardChunk = void (*)(const Problem&, const Block&, const Slice&, const T* grad_output, bool add, Dots& dots);

// The widest kernel for `channels` more channels; `taken` says how many of them it does.
template <class T, bool kDots, bool kScatter, bool kWhole>
BackwardChunk<T> backward_chunk_for(int channels, int& taken) {
  constexpr int L = DCNGEN_DOT_LANES;
  const int vectors = channels / L >= 8 ? 8 : channels / L < 4 ? channels / L : 4;
  taken = vectors * L;
  switch (vectors) {
    case 8: return backward_chunk<T, L, 8, kDots, kScatter, kWhole>;
    case 4: return backward_chunk<T, L, 4, kDots, kScatter, kWhole>;
    case 3: return backward_chunk<T, L, 3, kDots, kScatter, kWhole>;
    case 2: return backward_chunk<T, L, 2, kDots, kScatter, kWhole>;
    case 1: return backward_chunk<T, L, 1, kDots, kScatter, kWhole>;
  }
  if constexpr (L > 4) {
    taken = 4;
    if (channels >= 4) return backward_chunk<T, 4, 1, kDots, kScatter, kWhole>;
  }
  taken = 1;
  return backward_chunk<T, 1, 1, kDots, kScatter, kWhole>;
}

template <class T, bool kDots, bool kScatter>
void backward_block(const Problem& q, const Block& b, const Slice& slice, const T* grad_output, Dots& dots) {
  const int channels = static_cast<int>(slice.channels);
  int taken = 0;
  const BackwardChunk<T> whole = backward_chunk_for<T, kDots, kScatter, true>(channels, taken);
  if (taken == channels) return whole(q, b, slice, grad_output, false, dots);
  for (int channel = 0; channel < channels; channel += taken) {
    const BackwardChunk<T> run = backward_chunk_for<T, kDots, kScatter, false>(channels - channel, taken);
    const Slice chunk{kDots ? slice.input + channel : nullptr, kScatter ? slice.sums + channel : nullptr, channels};
    run(q, b, chunk, grad_output + channel, channel > 0, dots);
  }
}

// The gradients of a block's samples: offsets, and the mask after softmax.
struct PlaceGrads {
  alignas(64) float x[kMaxSamples], y[kMaxSamples], mask[kMaxSamples];
};

inline void place_grads(const Block& b, const Dots& dots, float scale, PlaceGrads& grads) {
  constexpr int L = DCNGEN_WIDE_LANES;
  for (int s = 0; s < b.samples; s += L) {
    Vec<L> dot[4];
    for (int i = 0; i < 4; ++i) dot[i] = load<L>(dots.value + 4 * s + i * L);
    split_quadruples<L>(dot);
    Flags<L> counts;
    __builtin_memcpy(&counts, b.counts + s, sizeof(counts));
    const Vec<L> lx = load<L>(b.x + s), ly = load<L>(b.y + s), factor = scale * load<L>(b.mask + s);
    const Vec<L> top = dot[1] - dot[0], bottom = dot[3] - dot[2];  // d(bilinear)/dx in the two rows
    const Vec<L> upper = dot[0] + lx * top, lower = dot[2] + lx * bottom;
    const Vec<L> grad_x = factor * (top + ly * (bottom - top)), grad_y = factor * (lower - upper);
    const Vec<L> grad_mask = upper + ly * (lower - upper);
    store<L>(grads.x + s, counts ? grad_x : Vec<L>{});
    store<L>(grads.y + s, counts ? grad_y : Vec<L>{});
    store<L>(grads.mask + s, counts ? grad_mask : Vec<L>{});
  }
}

// Through softmax: grad of logit k = w_k * (grad_k - sum_j w_j grad_j).
inline void softmax_grads(const float* weights, float* grads, int taps) {
  float mean = 0.f;
  for (int k = 0; k < taps; ++k) mean += weights[k] * grads[k];
  for (int k = 0; k < taps; ++k) grads[k] = weights[k] * (grads[k] - mean);
}

// Where one pixel's 3 * taps gradients are put together: in place where they are stored as floats.
inline float* assembly_of(float* to, float*) { return to; }
template <class T>
inline float* assembly_of(T*, float* buffer) {
  return buffer;
}
inline void finish(float*, const float*, int) {}
template <class T>
inline void finish(T* to, const float* from, int count) {
  convert(to, from, count);
}

// Writes grad_offset_mask of a block.
template <class T>
void write_place_grads(const Problem& q, const Block& b, const Dots& dots, T* to) {
  constexpr int L = DCNGEN_DOT_LANES;
  const int taps = q.taps;
  PlaceGrads grads;
  place_grads(b, dots, q.p.offset_scale, grads);
  float buffer[3 * kMaxSamples];
  int s = 0;
  for (int pixel = 0; pixel < b.pixels; ++pixel, to += q.p.grad_offset_mask_pixel_stride, s += taps) {
    if (q.p.softmax) softmax_grads(b.mask + s, grads.mask + s, taps);
    prefetch<true>(to, q.p.grad_offset_mask_pixel_stride, 3 * taps);
    float* values = assembly_of(to, buffer);
    int k = for_each_vector<L>(taps, [&](int k) {
      const Vec<L> x = load<L>(grads.x + s + k), y = load<L>(grads.y + s + k);
      store<L>(values + 2 * k, joined_low<L>(x, y));
      store<L>(values + 2 * k + L, joined_high<L>(x, y));
      store<L>(values + 2 * taps + k, load<L>(grads.mask + s + k));
    });
    for (; k < taps; ++k) {
      values[2 * k] = grads.x[s + k];
      values[2 * k + 1] = grads.y[s + k];
      values[2 * taps + k] = grads.mask[s + k];
    }
    finish(to, values, 3 * taps);
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

// What is known of a block, kept from block to block for its memory.
struct Samples {
  Block block;
  Dots dots;
};

// One output row of one group, of whose channels the slice holds those from first_channel on.
template <class T, bool kDots, bool kScatter>
void backward_row(const Backward& b, const Row& row, const Slice& slice, int first_channel, Samples& samples) {
  const Problem& q = *b.problem;
  const auto& p = q.p;
  const int64_t line = (row.image * p.height_out + row.y) * p.width_out;
  const T* grad_output = static_cast<const T*>(b.grad_output) + line * p.output_pixel_stride +
                         int64_t{row.group} * p.group_channels + first_channel;
  T* grad_line = static_cast<T*>(b.grad_offset_mask) + line * p.grad_offset_mask_pixel_stride;
  for_each_block(q, [&](int64_t x, int pixels) {
    find_places<T>(q, b.offset_mask, row, x, pixels, samples.block);
    backward_block<T, kDots, kScatter>(q, samples.block, slice, grad_output + x * p.output_pixel_stride, samples.dots);
    if constexpr (kDots) {
      write_place_grads(q, samples.block, samples.dots,
                        grad_line + x * p.grad_offset_mask_pixel_stride + int64_t{3} * q.taps * row.group);
    }
  });
  if constexpr (kDots) {
    if (row.group == p.groups - 1) clear_padding(q, grad_line);
  }
}

template <class T>
void backward_rows(const Backward& b, int64_t first_row, int64_t last_row) {
  const Problem& q = *b.problem;
  Samples samples{};
  for (int64_t r = first_row; r < last_row; ++r) {
    const int64_t unit = r / q.p.height_out;
    const Slice slice{b.images + unit * image_floats(q), nullptr, q.p.group_channels};
    backward_row<T, true, false>(b, row_of(q.p, unit, r % q.p.height_out), slice, 0, samples);
  }
}

// Rounds the finished sums of a slice into grad_input.
template <class T>
void write_input_grads(const Backward& b, int64_t unit, int first_channel, const Slice& slice) {
  const Problem& q = *b.problem;
  const auto& p = q.p;
  T* to = unit_of(q, static_cast<T*>(b.grad_input), unit, p.grad_input_pixel_stride) + first_channel;
  for (int64_t y = 0; y < p.height_in; ++y) {
    const float* from = slice.sums + padded_row(q, y) * slice.channels;
    for (int64_t x = 0; x < p.width_in; ++x, to += p.grad_input_pixel_stride, from += slice.channels) {
      convert(to, from, slice.channels);
    }
  }
}

template <class T>
void backward_slices(const Backward& b, int64_t first_slice, int64_t last_slice, float* scratch, bool with_places) {
  const Problem& q = *b.problem;
  const auto& p = q.p;
  Samples samples{};
  for (int64_t index = first_slice; index < last_slice; ++index) {
    const int64_t unit = index / b.slices_per_group;
    const int first = static_cast<int>(index % b.slices_per_group) * b.slice_channels;
    const int rest = p.group_channels - first, channels = rest < b.slice_channels ? rest : b.slice_channels;
    float* image = scratch + q.padded_pixels * channels;
    const Slice slice{with_places ? image : nullptr, scratch, channels};
    if (with_places) pad_unit<T>(q, b.input, unit, image);
    clear(slice.sums, q.padded_pixels * channels);
    for (int64_t y = 0; y < p.height_out; ++y) {
      const Row row = row_of(p, unit, y);
      if (with_places) {
        backward_row<T, true, true>(b, row, slice, first, samples);
      } else {
        backward_row<T, false, true>(b, row, slice, first, samples);
      }
    }
    write_input_grads<T>(b, unit, first, slice);
  }
}
