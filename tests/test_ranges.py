"""NVTX ranges: a step reads like the paper, and off they are not there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_runs import tiny, trainer_of
from torch import Tensor

import jepa_fast
from jepa_fast import IJepa, ProbIJepa, TCJepa, TIJepa, ops, ranges
from jepa_fast.masks import BlockMasks
from jepa_fast.nn.vit import VisionTransformer
from jepa_fast.ops._registry import OPERATORS
from jepa_fast.perf import disable_ranges, enable_ranges, phase, use_ranges

MASKS = BlockMasks(
    torch.tensor([[0, 1, 2, 4, 8], [3, 4, 5, 11, 15]]),
    torch.tensor([[[6, 7], [10, 11]], [[0, 1], [8, 9]]]),
    None,
    (4, 4),
)


class FakeNvtx(ModuleType):
    """Stands for the nvtx package; `lines` are the ranges, indented by how deep they are nested."""

    def __init__(self) -> None:
        super().__init__("nvtx")
        self.lines: list[str] = []
        self.made: list[dict[str, Any]] = []
        self.domains: list[str] = []
        self.depth = 0

    def get_domain(self, name: str) -> FakeNvtx:
        self.domains.append(name)
        return self

    def get_event_attributes(self, **attributes: Any) -> dict[str, Any]:
        self.made.append(attributes)
        return attributes

    def push_range(self, attributes: dict[str, Any]) -> None:
        self.lines.append("  " * self.depth + attributes["message"])
        self.depth += 1

    def pop_range(self) -> None:
        self.depth -= 1
        assert self.depth >= 0, "a range was popped that had not been pushed"

    def phases(self) -> list[str]:
        """The lines without the operators."""
        return [line for line in self.lines if not line.strip().startswith("jepa_fast.")]


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvtx]:
    """A recording package in place of nvtx; whatever a test does, ranges are off afterwards."""
    monkeypatch.delenv("JEPA_FAST_BACKEND", raising=False)
    fake = FakeNvtx()
    monkeypatch.setitem(sys.modules, "nvtx", fake)
    yield fake
    disable_ranges()
    assert fake.depth == 0


def _tree(text: str) -> list[str]:
    return [line[8:].rstrip() for line in text.splitlines() if line.strip()]


def _encoder() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(16, 4, embed_dim=32, depth=1, num_heads=2)


SMALL = {"predictor_dim": 16, "predictor_depth": 2}


def _ijepa() -> tuple[IJepa, tuple[Any, ...]]:
    return IJepa(_encoder(), **SMALL), (torch.randn(2, 3, 16, 16), MASKS)


def _probijepa() -> tuple[ProbIJepa, tuple[Any, ...]]:
    return ProbIJepa(_encoder(), "mixture", **SMALL), (torch.randn(2, 3, 16, 16), MASKS)


def _tcjepa() -> tuple[TCJepa, tuple[Any, ...]]:
    words = torch.randn(2, 1, 3, 10)
    return TCJepa(_encoder(), text_dim=10, **SMALL), (torch.randn(2, 3, 16, 16), MASKS, words)


def _tijepa(**options: Any) -> tuple[TIJepa, tuple[Any, ...]]:
    sizes = {"text_dim": 12, "width": 16, "depth": 1, "num_heads": 4, "predictor_heads": 2}
    model = TIJepa(_encoder(), **sizes, **SMALL, **options)
    return model, (torch.randn(2, 3, 16, 16), MASKS, torch.randn(2, 3, 12))


def _cross_modal() -> tuple[TIJepa, tuple[Any, ...]]:
    return _tijepa(objective="cross_modal")


MODELS = {
    "ijepa": _ijepa,
    "probijepa": _probijepa,
    "tcjepa": _tcjepa,
    "tijepa": _tijepa,
    "cross_modal": _cross_modal,
}


def _step(model: Any, inputs: tuple[Any, ...]) -> None:
    with phase("forward"):
        output = model(*inputs)
    with phase("backward"):
        output.loss.backward()
    model.update_target(0.9)


PAPERS = {
    "ijepa": """
        forward
          target encoder
          context encoder
            jepa_fast.gather_patches [reference]
          predictor
            jepa_fast.assemble_predictor_tokens [reference]
          loss
            jepa_fast.latent_loss [reference]
          metrics
            jepa_fast.gather_patches [reference]
        backward
          jepa_fast.assemble_predictor_tokens_backward [reference]
          jepa_fast.gather_patches_backward [reference]
        EMA of the target
          jepa_fast.ema_update_ [reference]
    """,
    "probijepa": """
        forward
          target encoder
          targets
            jepa_fast.gather_patches [reference]
          context encoder
            jepa_fast.gather_patches [reference]
          predictor
            jepa_fast.assemble_predictor_tokens [reference]
          loss
            jepa_fast.linear_mixture_nll [reference]
          metrics
        backward
          jepa_fast.linear_mixture_nll_backward [reference]
          jepa_fast.assemble_predictor_tokens_backward [reference]
          jepa_fast.gather_patches_backward [reference]
        EMA of the target
          jepa_fast.ema_update_ [reference]
    """,
    "tcjepa": """
        forward
          target encoder
          context encoder
            jepa_fast.gather_patches [reference]
          text conditioner
          predictor
            jepa_fast.assemble_predictor_tokens [reference]
            text conditioner
              jepa_fast.text_cross_attention [reference]
            text conditioner
              jepa_fast.text_cross_attention [reference]
          loss
            jepa_fast.latent_loss [reference]
            jepa_fast.patch_word_consistency [reference]
          metrics
            jepa_fast.gather_patches [reference]
        backward
          jepa_fast.patch_word_consistency_backward [reference]
          jepa_fast.text_cross_attention_backward [reference]
          jepa_fast.text_cross_attention_backward [reference]
          jepa_fast.assemble_predictor_tokens_backward [reference]
          jepa_fast.gather_patches_backward [reference]
        EMA of the target
          jepa_fast.ema_update_ [reference]
    """,
    "tijepa": """
        forward
          frozen image encoder
          masks
            jepa_fast.gather_patches [reference]
          context crosser
          predictor
            jepa_fast.assemble_predictor_tokens [reference]
          target crosser
          loss
            jepa_fast.latent_loss [reference]
          metrics
            jepa_fast.gather_patches [reference]
            context crosser
            predictor
              jepa_fast.assemble_predictor_tokens [reference]
            target crosser
            jepa_fast.gather_patches [reference]
        backward
          jepa_fast.assemble_predictor_tokens_backward [reference]
        EMA of the target
          jepa_fast.ema_update_ [reference]
    """,
    "cross_modal": """
        forward
          frozen image encoder
          context encoder
          target encoder
          predictor
          loss
            jepa_fast.latent_loss [reference]
          loss
            jepa_fast.latent_loss [reference]
          metrics
        backward
          jepa_fast.latent_loss_backward [reference]
          jepa_fast.latent_loss_backward [reference]
        EMA of the target
          jepa_fast.ema_update_ [reference]
    """,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_reads_like_the_paper(
    name: str, nvtx: FakeNvtx, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JEPA_FAST_BACKEND", "reference")  # whatever kernels this machine has
    model, inputs = MODELS[name]()
    with use_ranges():
        _step(model, inputs)
    assert nvtx.lines == _tree(PAPERS[name])
    assert nvtx.domains == ["jepa_fast"]
    categories = {made["message"]: made["category"] for made in nvtx.made}
    assert categories["jepa_fast.ema_update_ [reference]"] == "operators"
    assert categories["loss"] == "phases"


def test_encoding_is_the_target_encoders(nvtx: FakeNvtx) -> None:
    expected = {
        "ijepa": ["target encoder"],
        "tijepa": ["frozen image encoder", "target crosser"],
        "cross_modal": ["frozen image encoder", "target encoder"],
    }
    for name, lines in expected.items():
        model, inputs = MODELS[name]()
        nvtx.lines.clear()
        with use_ranges():
            model.encode(inputs[0])
        assert nvtx.lines == lines


TRAINING = """
        step
          data
          masks
          forward
            target encoder
            context encoder
            predictor
            loss
            metrics
          backward
          gradient averaging
          clipping
          optimizer and EMA of the target
"""


def test_training_steps_have_their_phases(nvtx: FakeNvtx, tmp_path: Path) -> None:
    trainer = trainer_of(tiny(tmp_path, "train.steps=2", "train.clip_grad=1"))
    with use_ranges():
        trainer.fit()
    assert nvtx.phases() == 2 * _tree(TRAINING)
    numbers = [made["payload"] for made in nvtx.made if made["message"] == "step"]
    assert numbers == [0, 1]


def test_training_with_text_has_its_encoder(nvtx: FakeNvtx, tmp_path: Path) -> None:
    trainer = trainer_of(tiny(tmp_path, "train.steps=1", "model.method=tcjepa"))
    with use_ranges():
        trainer.fit()
    assert nvtx.phases()[:5] == _tree("""
        step
          data
          masks
          text encoder
          forward
    """)
    assert "    text conditioner" in nvtx.lines


def test_operators_are_named_after_their_backend(nvtx: FakeNvtx) -> None:
    targets, sources = [torch.zeros(3)], [torch.ones(3)]
    with use_ranges():
        for backend in ("reference", "auto"):
            ops.ema_update_(targets, sources, 0.5, backend=backend)
    operator = OPERATORS["ema_update_"]
    chosen = operator.select("auto", (targets, sources, [], torch.tensor(0.5)))
    assert nvtx.lines == [f"jepa_fast.ema_update_ [{b}]" for b in ("reference", chosen)]


def test_off_again_nothing_is_wrapped(nvtx: FakeNvtx) -> None:
    def run() -> Any:
        ops.gather_patches(torch.zeros(1, 3, 2), torch.tensor([[2]]), backend="reference")
        return OPERATORS["gather_patches"].function("reference")

    disable_ranges()
    plain = run()
    enable_ranges()
    assert run() is not plain
    disable_ranges()
    seen = list(nvtx.lines)
    assert seen == ["jepa_fast.gather_patches [reference]"]
    assert run() is plain
    with phase("loss"):
        pass
    assert nvtx.lines == seen


def test_use_ranges_leaves_them_as_they_were(nvtx: FakeNvtx) -> None:
    with use_ranges():
        with use_ranges():
            pass
        with phase("inside"):
            pass
    with phase("after"):
        pass
    assert nvtx.lines == ["inside"]


def test_a_phase_ends_though_ranges_were_switched_off_inside(nvtx: FakeNvtx) -> None:
    enable_ranges()
    with phase("loss"):
        disable_ranges()
    assert nvtx.lines == ["loss"]
    assert nvtx.depth == 0
    with phase("loss"):
        enable_ranges()
    assert nvtx.depth == 0


def test_exceptions_end_ranges(nvtx: FakeNvtx, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, masks) = _ijepa()
    with use_ranges():
        with pytest.raises(ValueError, match="index"):
            # Looked at inside the implementation, so that the operator's range is open.
            ops.gather_patches(torch.zeros(1, 3, 2), torch.tensor([[7]]))
        assert nvtx.lines
        assert nvtx.depth == 0

        def fail(*args: Any) -> None:
            raise RuntimeError("in the predictor")

        monkeypatch.setattr(model.predictor, "forward", fail)
        with pytest.raises(RuntimeError, match="in the predictor"), phase("forward"):
            model(images, masks)
        assert nvtx.lines[-1] == "  predictor"
        assert nvtx.depth == 0


class _Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError("in the backward pass")


def test_a_failing_step_of_the_trainer_ends_its_ranges(nvtx: FakeNvtx, tmp_path: Path) -> None:
    trainer = trainer_of(tiny(tmp_path, "train.steps=1"))
    forward = trainer.model.forward

    def broken(*args: Any, **keywords: Any) -> Any:
        output = forward(*args, **keywords)
        output.loss = _Broken.apply(output.loss)
        return output

    trainer.model.forward = broken
    with use_ranges(), pytest.raises(RuntimeError, match="in the backward pass"):
        trainer.fit()
    assert nvtx.lines[-1] == "  backward"
    assert nvtx.depth == 0


@pytest.mark.parametrize("name", [name for name in MODELS if name != "tijepa"])
def test_compiled_models_have_one_graph_on_and_off(name: str, nvtx: FakeNvtx) -> None:
    """(The size of TI-JEPA's union of blocks depends on data, so its graph has breaks anyway.)"""
    torch._dynamo.reset()
    model, inputs = MODELS[name]()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = model(*inputs).loss
    with torch._dynamo.config.patch(error_on_recompile=True):
        for on in (False, True, False):
            nvtx.lines.clear()
            (enable_ranges if on else disable_ranges)()
            output = compiled(*inputs)
            torch.testing.assert_close(output.loss, expected)
            output.loss.backward()
            assert bool(nvtx.lines) == on
            if on:  # the operators have theirs; forward and backward
                assert nvtx.phases() == []
                assert any("_backward [" in line for line in nvtx.lines)


def test_a_model_compiled_with_ranges_on_runs_with_them_off(nvtx: FakeNvtx) -> None:
    torch._dynamo.reset()
    model, inputs = _ijepa()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        with use_ranges():
            compiled(*inputs)
        assert nvtx.lines
        nvtx.lines.clear()
        compiled(*inputs)
    assert nvtx.lines == []


def test_ti_jepa_compiles_as_before(nvtx: FakeNvtx) -> None:
    torch._dynamo.reset()
    model, inputs = _tijepa()
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for switch in (disable_ranges, enable_ranges, disable_ranges):
            switch()
            torch.testing.assert_close(compiled(*inputs).loss, model(*inputs).loss)
            assert nvtx.depth == 0


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(
        ImportError, match=r'NVTX ranges need nvtx: pip install "jepa-fast\[nvtx\]"'
    ):
        jepa_fast.perf.enable_ranges()
    with pytest.raises(ImportError, match="jepa-fast"), use_ranges():
        pass
    assert ranges._domain is None


def _python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", **environment},
        cwd=Path(__file__).resolve().parent,
        capture_output=True,
        text=True,
    )


def test_off_by_default_without_importing_nvtx() -> None:
    done = _python(
        "import sys, torch, jepa_fast\n"
        "from jepa_fast import ops\n"
        "model = jepa_fast.IJepa('vit_tiny_patch16', img_size=32)\n"
        "ops.ema_update_([torch.zeros(2)], [torch.ones(2)], 0.5)\n"
        "model.encode(torch.zeros(1, 3, 32, 32))\n"
        "print('nvtx' in sys.modules)"
    )
    assert done.stdout == "False\n", done.stderr


SWITCHED = """
import sys, types
fake, seen = types.ModuleType("nvtx"), []
fake.get_domain = lambda name: fake
fake.get_event_attributes = lambda **attributes: attributes["message"]
fake.push_range = seen.append
fake.pop_range = lambda: seen.append("end")
sys.modules["nvtx"] = fake
import torch
from jepa_fast import ops
ops.ema_update_([torch.zeros(2)], [torch.ones(2)], 0.5, backend="reference")
print(seen)
"""


def test_the_environment_switches_ranges_on() -> None:
    done = _python(SWITCHED, JEPA_FAST_NVTX="1")
    assert done.stdout == "['jepa_fast.ema_update_ [reference]', 'end']\n", done.stderr
    assert _python(SWITCHED, JEPA_FAST_NVTX="0").stdout == "[]\n"


def test_the_environment_without_the_package_is_an_error() -> None:
    program = "import sys; sys.modules['nvtx'] = None; import jepa_fast; jepa_fast.ops"
    done = _python(program, JEPA_FAST_NVTX="1")
    assert done.returncode != 0
    assert 'pip install "jepa-fast[nvtx]"' in done.stderr


RECORDER = r"""
#include <nvtx3/nvToolsExt.h>
#include <cstdio>
#include <cstring>
static int depth = 0;
static nvtxDomainHandle_t create(const char* name) {
  printf("domain %s\n", name);
  return (nvtxDomainHandle_t)strdup(name);
}
static nvtxStringHandle_t intern(nvtxDomainHandle_t, const char* text) {
  return (nvtxStringHandle_t)strdup(text);
}
static int push(nvtxDomainHandle_t, const nvtxEventAttributes_t* of) {
  bool interned = of->messageType == NVTX_MESSAGE_TYPE_REGISTERED;
  const char* text = interned ? (const char*)of->message.registered : of->message.ascii;
  printf("%*s%s\n", 2 * depth, "", text);
  return depth++;
}
static int pop(nvtxDomainHandle_t) { return --depth; }
extern "C" int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t tables) {
  auto callbacks = (const NvtxExportTableCallbacks*)tables(NVTX_ETID_CALLBACKS);
  NvtxFunctionTable at;
  unsigned size;
  callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &at, &size);
  *at[NVTX_CBID_CORE2_DomainCreateA] = (NvtxFunctionPointer)create;
  *at[NVTX_CBID_CORE2_DomainRegisterStringA] = (NvtxFunctionPointer)intern;
  *at[NVTX_CBID_CORE2_DomainRangePushEx] = (NvtxFunctionPointer)push;
  *at[NVTX_CBID_CORE2_DomainRangePop] = (NvtxFunctionPointer)pop;
  return 1;
}
"""


def test_what_a_profiler_sees(tmp_path: Path) -> None:
    """The real package, with a library in the place where nsys puts its own."""
    nvtx = pytest.importorskip("nvtx", reason="needs nvtx")
    packages = Path(nvtx.__file__).parents[1]
    header = "include/nvtx3/nvToolsExt.h"
    folders = [*packages.glob(f"nvidia/*/{header}"), *Path("/usr/local/cuda").glob(header)]
    if shutil.which("g++") is None or not folders:
        pytest.skip("needs g++ and the headers of NVTX, which torch for CUDA brings")
    source, library = tmp_path / "recorder.cpp", tmp_path / "recorder.so"
    source.write_text(RECORDER)
    include = folders[0].parents[1]
    build = ["g++", "-shared", "-fPIC", f"-I{include}", "-o", str(library), str(source)]
    subprocess.run(build, check=True)
    program = "import test_ranges as t; t._step(*t._tcjepa())"
    done = _python(
        program,
        JEPA_FAST_NVTX="1",
        JEPA_FAST_BACKEND="reference",
        NVTX_INJECTION64_PATH=str(library),
    )
    assert done.stdout.splitlines() == ["domain jepa_fast", *_tree(PAPERS["tcjepa"])], done.stderr


def test_without_a_profiler_the_real_package_does_nothing() -> None:
    pytest.importorskip("nvtx", reason="needs nvtx")
    done = _python("import test_ranges as t; t._step(*t._ijepa())", JEPA_FAST_NVTX="1")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_perf_hands_the_functions_on() -> None:
    for name in ("disable_ranges", "enable_ranges", "phase", "use_ranges"):
        assert getattr(jepa_fast.perf, name) is getattr(ranges, name)
        assert getattr(ranges, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'enable'"):
        _ = jepa_fast.perf.enable
