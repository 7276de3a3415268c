// Forward: output = sum over taps and corners of weight * input, V vectors of L channels held in registers.

// image: the padded image from the chunk's first channel on; `channels` floats a pixel.
template <class T, int L, int V>
void gather(const Problem& q, const Block& b, const float* image, int64_t channels, T* output) {
  constexpr int kSums = V >= 4 ? 2 : 4;  // independent sums, to hide the latency of the additions
  const int taps = q.taps;
  const int64_t corners[4] = {0, channels, q.padded_width * channels, (q.padded_width + 1) * channels};
  for (int pixel = 0; pixel < b.pixels; ++pixel) {
    Vec<L> sum[kSums][V] = {};
    const int end = (pixel + 1) * taps;
    for (int s = pixel * taps; s < end; ++s) {
      const float* first = image + b.pixel[s] * channels;
      for (int c = 0; c < 4; ++c) {
        const Vec<L> weight = splat<L>(b.weight[c][s]);
        for (int v = 0; v < V; ++v) sum[c % kSums][v] += weight * load<L>(first + corners[c] + v * L);
      }
    }
    for (int v = 0; v < V; ++v) {
      Vec<L> total = sum[0][v] + sum[1][v];
      if constexpr (kSums == 4) total += sum[2][v] + sum[3][v];
      store<L>(output + pixel * q.p.output_pixel_stride + v * L, total);
    }
  }
}

template <class T>
using Gather = void (*)(const Problem&, const Block&, const float* image, int64_t channels, T* output);

// The widest kernel for `channels` more channels; `taken` says how many of them it does.
template <class T>
Gather<T> gather_for(int channels, int& taken) {
  constexpr int L = DCNGEN_WIDE_LANES;
  const int vectors = channels / L < 4 ? channels / L : 4;
  taken = vectors * L;
  switch (vectors) {
    case 4: return gather<T, L, 4>;
    case 3: return gather<T, L, 3>;
    case 2: return gather<T, L, 2>;
    case 1: return gather<T, L, 1>;
  }
  if constexpr (L > 8) {
    taken = 8;
    if (channels >= 8) return gather<T, 8, 1>;
  }
  if constexpr (L > 4) {
    taken = 4;
    if (channels >= 4) return gather<T, 4, 1>;
  }
  taken = 1;
  return gather<T, 1, 1>;
}

template <class T>
void forward_row(const Forward& f, const Row& row, const float* image, Block& block) {
  const Problem& q = *f.problem;
  const auto& p = q.p;
  T* output = static_cast<T*>(f.output) + (row.image * p.height_out + row.y) * p.width_out * p.output_pixel_stride +
              int64_t{row.group} * p.group_channels;
  for_each_block(q, [&](int64_t x, int pixels) {
    find_places<T>(q, f.offset_mask, row, x, pixels, block);
    int taken = 0;
    for (int channel = 0; channel < p.group_channels; channel += taken) {
      const Gather<T> run = gather_for<T>(p.group_channels - channel, taken);
      run(q, block, image + channel, p.group_channels, output + x * p.output_pixel_stride + channel);
    }
  });
}

template <class T>
void forward_rows(const Forward& f, int64_t first_row, int64_t last_row, float* scratch) {
  const Problem& q = *f.problem;
  Block block{};
  int64_t in_scratch = -1;  // the unit whose padded image that is
  for (int64_t r = first_row; r < last_row; ++r) {
    const int64_t unit = r / q.p.height_out;
    if (!f.images && unit != in_scratch) {
      pad_unit<T>(q, f.input, unit, scratch);
      in_scratch = unit;
    }
    const float* image = f.images ? f.images + unit * image_floats(q) : scratch;
    forward_row<T>(f, row_of(q.p, unit, r % q.p.height_out), image, block);
  }
}
