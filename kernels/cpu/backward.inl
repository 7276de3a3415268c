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
        Vec<4> sums = sums_of<L>(dot);
        if (channel) sums += load<4>(dots.value + 4 * s);  // the first chunk finds what an earlier block left
        store<4>(dots.value + 4 * s, sums);
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

// The gradients of a block's samples: offsets, and the mask after softmax.
struct PlaceGrads {
  alignas(64) float x[kMaxSamples], y[kMaxSamples], mask[kMaxSamples];
};

inline void place_grads(const Block& b, const Dots& dots, float scale, PlaceGrads& grads) {
  for (int s = 0; s < b.samples; s += 4) {
    Vec<4> dot[4];
    for (int i = 0; i < 4; ++i) dot[i] = load<4>(dots.value + 4 * (s + i));
    transpose4(dot);
    Flags<4> counts;
    __builtin_memcpy(&counts, b.counts + s, sizeof(counts));
    const Vec<4> lx = load<4>(b.x + s), ly = load<4>(b.y + s), factor = scale * load<4>(b.mask + s);
    const Vec<4> top = dot[1] - dot[0], bottom = dot[3] - dot[2];  // d(bilinear)/dx in the two rows
    const Vec<4> upper = dot[0] + lx * top, lower = dot[2] + lx * bottom;
    const Vec<4> grad_x = factor * (top + ly * (bottom - top)), grad_y = factor * (lower - upper);
    const Vec<4> grad_mask = upper + ly * (lower - upper);
    store<4>(grads.x + s, counts ? grad_x : Vec<4>{});
    store<4>(grads.y + s, counts ? grad_y : Vec<4>{});
    store<4>(grads.mask + s, counts ? grad_mask : Vec<4>{});
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
  for (int pixel = 0; pixel < b.pixels; ++pixel, to += q.p.grad_offset_mask_pixel_stride) {
    if (q.p.softmax) softmax_grads(b.mask + s, grads.mask + s, taps);
    float* values = assembly_of(to, buffer);
    int k = 0;
    for (; k + L <= taps; k += L, s += L) {
      join_pairs<L>(values + 2 * k, load<L>(grads.x + s), load<L>(grads.y + s));
      store<L>(values + 2 * taps + k, load<L>(grads.mask + s));
    }
    for (; k < taps; ++k, ++s) {
      values[2 * k] = grads.x[s];
      values[2 * k + 1] = grads.y[s];
      values[2 * taps + k] = grads.mask[s];
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
  Dots dots{};
  for_each_block(q, [&](int64_t x, int pixels) {
    find_places<T>(q, b.offset_mask, row, x, pixels, block);
    if constexpr (kDots) {
      resolve(block, input, p.input_pixel_stride * int64_t{sizeof(T)}, b.zeros, block.source);
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

    __builtin_memset(slice.sums, 0, static_cast<std::size_t>(pixels_in + 1) * slice.channels * sizeof(float));
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
