// Forward: output = sum over taps and corners of weight * input, V vectors of L channels held in registers.

template <class T, int L, int V>
void gather(const Block& b, int taps, int channel, T* output, int64_t stride) {
  constexpr int kSums = V >= 4 ? 2 : 4;  // independent sums, to hide the latency of the additions
  for (int pixel = 0; pixel < b.pixels; ++pixel) {
    Vec<L> sum[kSums][V] = {};
    const int end = (pixel + 1) * taps;
    for (int s = pixel * taps; s < end; ++s) {
      for (int c = 0; c < 4; ++c) {
        const T* source = reinterpret_cast<const T*>(b.source[c][s]) + channel;
        const Vec<L> weight = splat<L>(b.weight[c][s]);
        for (int v = 0; v < V; ++v) sum[c % kSums][v] += weight * load<L>(source + v * L);
      }
    }
    for (int v = 0; v < V; ++v) {
      Vec<L> total = sum[0][v] + sum[1][v];
      if constexpr (kSums == 4) total += sum[2][v] + sum[3][v];
      store<L>(output + pixel * stride + channel + v * L, total);
    }
  }
}

template <class T>
using Gather = void (*)(const Block&, int taps, int channel, T* output, int64_t stride);

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
void forward_rows(const Forward& f, int64_t first_row, int64_t last_row) {
  const Problem& q = *f.problem;
  const auto& p = q.p;
  Block block;
  for (int64_t r = first_row; r < last_row; ++r) {
    const Row row = row_of(p, r);
    const T* input = group_of<T>(p, f.input, row.image, row.group);
    T* output = static_cast<T*>(f.output) +
                (row.image * p.height_out + row.y) * p.width_out * p.output_pixel_stride +
                int64_t{row.group} * p.group_channels;
    for_each_block(q, [&](int64_t x, int pixels) {
      find_places<T>(q, f.offset_mask, row, x, pixels, block);
      resolve(block, input, p.input_pixel_stride * int64_t{sizeof(T)}, f.zeros, block.source);
      int taken = 0;
      for (int channel = 0; channel < p.group_channels; channel += taken) {
        const Gather<T> run = gather_for<T>(p.group_channels - channel, taken);
        run(block, q.taps, channel, output + x * p.output_pixel_stride, p.output_pixel_stride);
      }
    });
  }
}
