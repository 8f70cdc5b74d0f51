// The predictor's tokens on the CPU: each is written once, each gradient read once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "pages.h"
#include "rows.h"

namespace jepa_fast {
namespace {

// The rows of all sequences: [M * B, Kc + Kt], block-major, context tokens first.
struct Layout {
  int64_t batch, blocks, kept, hidden;  // B, M, Kc, Kt

  Layout(const Tensor& context_index, const Tensor& target_index)
      : batch(target_index.size(0)),
        blocks(target_index.size(1)),
        kept(context_index.size(1)),
        hidden(target_index.size(2)) {}

  int64_t rows_an_image() const { return kept + blocks * hidden; }
};

template <typename Out, typename Context, typename Position>
JEPA_FAST_CLONES void add_position(
    Out* out, const Context* token, const Position* position, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    out[i] = static_cast<Out>(
        static_cast<Position>(static_cast<Compute<Context>>(token[i])) + position[i]);
  }
}

// context [B, Kc, d]; mask_token [1, 1, d] and pos_embed [1, N, d], both contiguous and of the type
// that out [M * B, Kc + Kt, d] is computed in; indices and out are contiguous.
void assemble_predictor_tokens(
    Tensor context_tensor,
    Tensor mask_token,
    Tensor pos_embed,
    Tensor context_index,
    Tensor target_index,
    Tensor out_tensor) {
  const Rows context(context_tensor), mask(mask_token), position(pos_embed), out(out_tensor);
  const std::vector<int64_t> seen = read_index(context_index, position.count);
  const std::vector<int64_t> hidden = read_index(target_index, position.count);
  const Layout layout(context_index, target_index);
  expect_writes(out_tensor);
  visit_pair(
      out_tensor.scalar_type(), context_tensor.scalar_type(), [&](auto out_type, auto context_type) {
        using Out = typename decltype(out_type)::type;
        using Context = typename decltype(context_type)::type;
        using T = Compute<Out>;
        const int64_t rows = layout.rows_an_image();
        const auto context_row = [&](int64_t b, int64_t k) {
          Out* first = out.row<Out>(b, k);
          const T* at = position.row<T>(0, seen[b * layout.kept + k]);
          add_position(first, context.row<Context>(b, k), at, out.width);
          for (int64_t m = 1; m < layout.blocks; ++m) {
            std::memcpy(out.at(m * layout.batch + b, k), first, out.bytes);
          }
        };
        const auto mask_row = [&](int64_t b, int64_t m, int64_t k) {
          const T* at = position.row<T>(0, hidden[(b * layout.blocks + m) * layout.hidden + k]);
          Out* row = out.row<Out>(m * layout.batch + b, layout.kept + k);
          add_position(row, mask.row<T>(0, 0), at, out.width);
        };
        torch::stable::parallel_for(
            0, layout.batch * rows, row_grain(out.width), [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) {
                const int64_t b = i / rows, k = i % rows - layout.kept;
                if (k >= 0) {
                  mask_row(b, k / layout.hidden, k % layout.hidden);
                } else if (layout.blocks > 0) {
                  context_row(b, k + layout.kept);
                }
              }
            });
      });
}

template <typename T>
struct Backward {
  const Rows& grad;  // [M * B, Kc + Kt, d]
  const Layout& layout;

  const T* row(int64_t m, int64_t b, int64_t k) const {
    return grad.template row<T>(m * layout.batch + b, k);
  }

  // The context token k of image b stands in all of its sequences.
  template <typename Sum>
  void add_context(Sum* sum, int64_t b, int64_t k) const {
    for (int64_t m = 0; m < layout.blocks; ++m) add_row(sum, row(m, b, k), grad.width);
  }

  void context(const Rows& out) const {
    const int64_t kept = layout.kept;
    torch::stable::parallel_for(
        0, layout.batch * kept, row_grain(grad.width), [&](int64_t begin, int64_t end) {
          std::vector<Compute<T>> sum(grad.width);
          for (int64_t i = begin; i < end; ++i) {
            std::fill(sum.begin(), sum.end(), 0);
            add_context(sum.data(), i / kept, i % kept);
            convert_row(out.template row<T>(i / kept, i % kept), sum.data(), grad.width);
          }
        });
  }

  // Every image by itself and then all, so that the order of the sum is not the threads'.
  void mask_token(const Rows& out) const {
    const int64_t width = grad.width;
    std::vector<double> of_image(layout.batch * width);
    torch::stable::parallel_for(0, layout.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t m = 0; m < layout.blocks; ++m) {
          for (int64_t k = 0; k < layout.hidden; ++k) {
            add_row(of_image.data() + b * width, row(m, b, layout.kept + k), width);
          }
        }
      }
    });
    std::vector<double> sum(width);
    for (int64_t b = 0; b < layout.batch; ++b) {
      add_row(sum.data(), of_image.data() + b * width, width);
    }
    convert_row(out.template row<T>(0, 0), sum.data(), width);
  }

  void pos_embed(
      const Rows& out, const std::vector<int64_t>& seen, const std::vector<int64_t>& hidden) const {
    const int64_t contexts = seen.size();
    const Inverse inverse(out.count, contexts + hidden.size(), [&](int64_t i) {
      return i < contexts ? seen[i] : hidden[i - contexts];
    });
    torch::stable::parallel_for(0, out.count, 1, [&](int64_t begin, int64_t end) {
      std::vector<double> sum(grad.width);
      for (int64_t n = begin; n < end; ++n) {
        std::fill(sum.begin(), sum.end(), 0);
        for (int64_t j = inverse.first[n]; j < inverse.first[n + 1]; ++j) {
          const int64_t i = inverse.place[j];
          if (i < contexts) {
            add_context(sum.data(), i / layout.kept, i % layout.kept);
          } else {
            const int64_t block = (i - contexts) / layout.hidden;
            const T* at = row(
                block % layout.blocks,
                block / layout.blocks,
                layout.kept + (i - contexts) % layout.hidden);
            add_row(sum.data(), at, grad.width);
          }
        }
        convert_row(out.template row<T>(0, n), sum.data(), grad.width);
      }
    });
  }
};

// grad [M * B, Kc + Kt, d]; contiguous indices, and contiguous gradients [B, Kc, d], [1, 1, d] and
// [1, N, d] of its type, of which any may be absent.
void assemble_predictor_tokens_backward(
    Tensor grad_tensor,
    Tensor context_index,
    Tensor target_index,
    int64_t patches,
    std::optional<Tensor> context,
    std::optional<Tensor> mask_token,
    std::optional<Tensor> pos_embed) {
  const Rows grad(grad_tensor);
  const Layout layout(context_index, target_index);
  visit_floating(grad_tensor.scalar_type(), [&](auto type) {
    const Backward<typename decltype(type)::type> backward{grad, layout};
    if (context.has_value()) {
      expect_writes(*context);
      backward.context(Rows(*context));
    }
    if (mask_token.has_value()) backward.mask_token(Rows(*mask_token));
    if (pos_embed.has_value()) {
      backward.pos_embed(
          Rows(*pos_embed), read_index(context_index, patches), read_index(target_index, patches));
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_native, CPU, m) {
  m.impl("assemble_predictor_tokens", TORCH_BOX(&assemble_predictor_tokens));
  m.impl("assemble_predictor_tokens_backward", TORCH_BOX(&assemble_predictor_tokens_backward));
}

}  // namespace jepa_fast
