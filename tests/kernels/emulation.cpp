// csrc/'s kernels on the host: the same tiles, threads, taps and borders, without a GPU's instructions. Every load is
// checked to lie in its tensor, every tile element to be written before it is read, every result to be stored once.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <vector>

#include "tiles.h"

using namespace vmae;

namespace {

Problem problem_of(const int64_t* n) {
  Problem p;
  p.batch = n[0];
  p.channels = n[1];
  p.outputs = n[2];
  p.frames = n[3];
  p.height = n[4];
  p.width = n[5];
  for (int i = 0; i < 3; ++i) p.kernel[i] = n[6 + i], p.stride[i] = n[9 + i];
  return p;
}

struct Range {
  const float* first;
  int64_t count;
};

struct Failure {};

const float kUnwritten = NAN;

// What an asynchronous copy of VECTOR elements does.
template <int VECTOR>
void copy_in(float* to, const float* from, std::initializer_list<Range> allowed) {
  bool inside = from == nullptr;
  for (const Range& range : allowed) {
    inside |= range.first && from >= range.first && from + VECTOR <= range.first + range.count;
  }
  if (!inside) throw Failure();
  for (int i = 0; i < VECTOR; ++i) to[i] = from ? from[i] : 0.0f;
}

// VECTOR: elements of a store.
template <class Tile, int VECTOR>
void convolution(const Gather& g, Range body, Range head, Range weight, const float* bias, float* result,
                 float* result_head, int* stores, int* head_stores, bool silu) {
  using Operands = ConvolutionOperands<float, Tile::kRows, Tile::kColumns, Tile::kDepth, Tile::kVector>;
  using Rows = typename Operands::RowShare;
  using Columns = typename Operands::ColumnShare;
  int column_tiles = ceil_div(g.columns, Tile::kColumns);
  int64_t depth = static_cast<int64_t>(g.taps()) * g.channels;
  for (int64_t block = 0; block < convolution_tiles<Tile>(g); ++block) {
    int64_t first_row = block / column_tiles * Tile::kRows;
    int first_column = block % column_tiles * Tile::kColumns;
    std::vector<Operands> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back(g, body.first, head.first, weight.first, first_row, first_column, t);
    }
    std::vector<double> sums(Tile::kRows * Tile::kColumns);
    for (int64_t tile = 0; tile < ceil_div(depth, Tile::kDepth); ++tile) {
      std::vector<float> a(Tile::kRows * Tile::kDepth, kUnwritten), b(Tile::kColumns * Tile::kDepth, kUnwritten);
      for (int t = 0; t < kThreads; ++t) {
        for (int i = 0; i < Rows::kLines; ++i) {
          copy_in<Tile::kVector>(&a[Rows::line(t, i) * Tile::kDepth + Rows::element(t)], threads[t].source(i),
                                 {body, head});
        }
        for (int i = 0; i < Columns::kLines; ++i) {
          copy_in<Tile::kVector>(&b[Columns::line(t, i) * Tile::kDepth + Columns::element(t)],
                                 threads[t].weights(g, i), {weight});
        }
        threads[t].advance(g);
      }
      for (int m = 0; m < Tile::kRows; ++m) {
        for (int n = 0; n < Tile::kColumns; ++n) {
          double sum = 0;
          for (int k = 0; k < Tile::kDepth; ++k) sum += double(a[m * Tile::kDepth + k]) * b[n * Tile::kDepth + k];
          sums[m * Tile::kColumns + n] += sum;
        }
      }
    }
    using Out = Share<Tile::kRows, Tile::kColumns, VECTOR>;
    for (int t = 0; t < kThreads; ++t) {
      int column = Out::element(t);
      for (int i = 0; i < Out::kLines; ++i) {
        int64_t row = first_row + Out::line(t, i);
        if (row >= g.rows() || first_column + column >= g.columns) continue;
        Position at = position(g, row);
        float* to = result_place(g, result, result_head, at);
        int* count = result_place(g, stores, head_stores, at);
        if (to == nullptr) continue;
        for (int j = 0; j < VECTOR && first_column + column + j < g.columns; ++j) {
          double value = sums[Out::line(t, i) * Tile::kColumns + column + j];
          if (bias) value += bias[first_column + column + j];
          if (silu) value = value / (1 + std::exp(-value));
          to[first_column + column + j] = value;
          count[first_column + column + j] += 1;
        }
      }
    }
  }
}

template <class Tile>
void weight_gradient(const Gather& g, int slices, Range body, Range head, Range gradient, float* partial, int* stores) {
  using Operands = WeightGradientOperands<float, Tile::kRows, Tile::kColumns, Tile::kDepth, Tile::kVector>;
  using Rows = typename Operands::RowShare;
  using Columns = typename Operands::ColumnShare;
  int columns = g.taps() * g.channels, column_tiles = ceil_div(columns, Tile::kColumns);
  int64_t positions = g.rows(), length = slice_length(positions, slices, Tile::kDepth);
  for (int64_t block = 0; block < weight_gradient_tiles<Tile>(g) * slices; ++block) {
    int64_t slice = block % slices, tile = block / slices;
    int first_row = tile / column_tiles * Tile::kRows, first_column = tile % column_tiles * Tile::kColumns;
    int64_t first = slice * length, last = std::min(first + length, positions);
    std::vector<Operands> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back(g, body.first, head.first, gradient.first, first, last, first_row, first_column, t);
    }
    std::vector<double> sums(Tile::kRows * Tile::kColumns);
    for (int64_t step = 0; step < (last > first ? ceil_div(last - first, Tile::kDepth) : 0); ++step) {
      std::vector<float> a(Tile::kRows * Tile::kDepth, kUnwritten), b(Tile::kColumns * Tile::kDepth, kUnwritten);
      for (int t = 0; t < kThreads; ++t) {
        for (int i = 0; i < Rows::kLines; ++i) {
          copy_in<Tile::kVector>(&a[Rows::line(t, i) * Tile::kRows + Rows::element(t)], threads[t].gradients(g, t, i),
                                 {gradient});
        }
        for (int i = 0; i < Columns::kLines; ++i) {
          copy_in<Tile::kVector>(&b[Columns::line(t, i) * Tile::kColumns + Columns::element(t)],
                                 threads[t].source(g, t, i), {body, head});
        }
        threads[t].advance(g);
      }
      for (int k = 0; k < Tile::kDepth; ++k) {
        for (int m = 0; m < Tile::kRows; ++m) {
          for (int n = 0; n < Tile::kColumns; ++n) {
            sums[m * Tile::kColumns + n] += double(a[k * Tile::kRows + m]) * b[k * Tile::kColumns + n];
          }
        }
      }
    }
    for (int m = 0; m < Tile::kRows; ++m) {
      for (int n = 0; n < Tile::kColumns; ++n) {
        if (first_row + m >= g.columns || first_column + n >= columns) continue;
        int64_t at = (slice * g.columns + first_row + m) * columns + first_column + n;
        partial[at] = sums[m * Tile::kColumns + n];
        stores[at] += 1;
      }
    }
  }
}

int64_t video_count(const Problem& p, bool past) {
  return p.batch * (past ? p.past() : p.frames) * p.height * p.width * p.channels;
}

int64_t result_count(const Problem& p) { return p.batch * p.results(0) * p.results(1) * p.results(2) * p.outputs; }

int64_t weight_count(const Problem& p) {
  return int64_t{1} * p.outputs * p.channels * p.kernel[0] * p.kernel[1] * p.kernel[2];
}

// `run` with a table of tiles: for elements of 2 or 4 bytes, or, with 0, those for wgmma.
template <class Run>
int guarded(int table, Run&& run) {
  try {
    if (table == 0) {
      run(static_cast<HopperTiles*>(nullptr));
    } else if (table == 2) {
      run(static_cast<Tiles<2, 2>*>(nullptr));
    } else {
      run(static_cast<Tiles<4, 2>*>(nullptr));
    }
  } catch (const Failure&) {
    return 1;
  }
  return 0;
}

}  // namespace

// Each returns 1 where a load was outside its tensor. `aligned`: whether addresses allow copies of
// 16 bytes. `stores` counts the stores to each element of the result.
extern "C" {

int emulate_convolve(const int64_t* numbers, int table, int aligned, const float* video, const float* past,
                     const float* weight, const float* bias, int silu, float* result, int* stores) {
  Problem p = problem_of(numbers);
  Gather g = forward_gather(p);
  return guarded(table, [&](auto* of) {
    using Table = std::remove_pointer_t<decltype(of)>;
    with_tile<Table>(convolution_tile<Table>(g, aligned), [&](auto* tile) {
      convolution<std::remove_pointer_t<decltype(tile)>, Table::kVector>(
          g, {video, video_count(p, false)}, {past, video_count(p, true)}, {weight, weight_count(p)}, bias, result,
          nullptr, stores, nullptr, silu);
    });
  });
}

int emulate_input_gradient(const int64_t* numbers, int table, int aligned, const float* gradient, const float* weight,
                           float* video, float* past, int* stores, int* past_stores) {
  Problem p = problem_of(numbers);
  return guarded(table, [&](auto* of) {
    using Table = std::remove_pointer_t<decltype(of)>;
    for (const Gather& g : gradient_gathers(p, past != nullptr)) {
      with_tile<Table>(convolution_tile<Table>(g, aligned), [&](auto* tile) {
        convolution<std::remove_pointer_t<decltype(tile)>, Table::kVector>(
            g, {gradient, result_count(p)}, {nullptr, 0}, {weight, weight_count(p)}, nullptr, video, past, stores,
            past_stores, false);
      });
    }
  });
}

int emulate_weight_gradient(const int64_t* numbers, int table, int aligned, int slices, const float* video,
                            const float* past, const float* gradient, float* partial, int* stores) {
  Problem p = problem_of(numbers);
  Gather g = forward_gather(p);
  return guarded(table, [&](auto* of) {
    using Table = std::remove_pointer_t<decltype(of)>;
    with_tile<Table>(weight_gradient_tile<Table>(g, aligned), [&](auto* tile) {
      weight_gradient<std::remove_pointer_t<decltype(tile)>>(
          g, slices, {video, video_count(p, false)}, {past, video_count(p, true)}, {gradient, result_count(p)}, partial,
          stores);
    });
  });
}

int emulated_slices(const int64_t* numbers, int table) {
  Gather g = forward_gather(problem_of(numbers));
  int slices = 0;
  guarded(table, [&](auto* of) {
    using Table = std::remove_pointer_t<decltype(of)>;
    slices = weight_gradient_slices<Table>(g, weight_gradient_tile<Table>(g, true));
  });
  return slices;
}
// The element of the body that a tap of a row of the forward meets; -1 at a border.
int64_t emulated_place(const int64_t* numbers, int64_t row, int time, int height, int width) {
  Gather g = forward_gather(problem_of(numbers));
  const char* body = reinterpret_cast<const char*>(int64_t{1} << 20);  // to count from; nothing is read
  const char* at = source_place<const char>(g, body, nullptr, position(g, row), time, height, width);
  return at ? at - body : -1;
}
}
