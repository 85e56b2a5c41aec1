"""The parties of peers.py: one class for each, run in a process of its own, and the files that they read.

Nothing but the standard library is imported before a party is opened: each runs where its own packages are.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed import THREADS


class Model:
    """A party inside its process: a model that gives the scores of the last position.

    A subclass defines `__init__(folder, bits)` and `step(ids, new)`: ids (T,) in, scores (V,) out, from an empty cache
    if new. It makes the file that it reads where that is not there yet.
    """

    kv_bytes = 4  # of a number of the cache

    def __init__(self, folder: Path, bits: int) -> None:
        raise NotImplementedError

    def step(self, ids: Any, new: bool) -> Any:
        raise NotImplementedError

    def run(self, ids: list[int], count: int) -> tuple[float, float]:
        """Seconds for ids, and for each of `count` tokens after them (0 for none)."""
        began = time.perf_counter()
        scores = self.step(_array(ids), True)
        middle = time.perf_counter()
        for _ in range(count):
            scores = self.step(_array([int(scores.argmax())]), False)
        return middle - began, (time.perf_counter() - middle) / max(count, 1)

    def scores(self, ids: list[int]) -> Any:
        """(V,): of the token after ids, the last four of which are run one by one."""
        scores = self.step(_array(ids[:-4]), True)
        for token in ids[-4:]:
            scores = self.step(_array([token]), False)
        return scores


def _array(ids: list[int]) -> Any:
    import numpy as np

    return np.array(ids, np.int64)


class Gpt2np(Model):
    """Fewer bits: `load(..., weights=...)`."""

    def __init__(self, folder: Path, bits: int) -> None:
        import gpt2np

        gpt2np.set_num_threads(min(THREADS, gpt2np.get_num_threads()))
        kind = {32: "float32", 16: "float16", 8: "int8", 4: "int4"}[bits]
        self.model = gpt2np.load(folder / "past", weights=kind)
        self.cache = self.model.new_cache()

    def step(self, ids: Any, new: bool) -> Any:
        if new:
            self.cache.crop(0)
        if len(ids) == 1:
            return self.model.next_logits(ids.tolist(), self.cache)[0]
        return self.model(ids[None], cache=self.cache, logits="last").logits[0, -1]


class OnnxRuntime(Model):
    """8 bits: quantize_dynamic, a scale a column; 4 bits: MatMulNBits in groups of 32.

    Of the 8 bits 7 are used, as its documentation advises for CPUs without VNNI: there sums of 8 x 8 bits saturate, and
    errors grow tenfold.
    """

    def __init__(self, folder: Path, bits: int) -> None:
        import numpy as np
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.log_severity_level = 3
        file = folder / f"onnx-{bits}.onnx"
        if not file.exists():
            self.quantise(folder / "onnx-32.onnx", file, bits)
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.outputs = [port.name for port in self.session.get_outputs()]
        pasts = [port for port in self.session.get_inputs() if port.name.startswith("past_")]
        self.empty = {port.name: np.zeros((1, port.shape[1], 0, port.shape[3]), np.float32) for port in pasts}
        self.past: dict[str, Any] = {}

    @staticmethod
    def quantise(source: Path, target: Path, bits: int) -> None:
        from onnxruntime import quantization

        if bits == 8:
            options = {"per_channel": True, "reduce_range": True, "weight_type": quantization.QuantType.QInt8}
            quantization.quantize_dynamic(source, target, ["MatMul"], **options)
            return
        import onnx
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        quantizer.model.save_model_to_file(str(target))

    def step(self, ids: Any, new: bool) -> Any:
        import numpy as np

        past = self.empty if new else self.past
        start = next(iter(past.values())).shape[2]
        feeds = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, start + len(ids)), np.int64),
            "position_ids": np.arange(start, start + len(ids))[None],
        }
        results = dict(zip(self.outputs, self.session.run(self.outputs, feeds | past), strict=True))
        self.past = {name: results[name.replace("past_key_values", "present")] for name in self.empty}
        return results["logits"][0, -1]


class OpenVino(Model):
    """The ONNX file with keys and values as its state; below 32 bits compressed by OpenVINO's own tools."""

    def __init__(self, folder: Path, bits: int) -> None:
        import openvino
        from openvino._offline_transformations import apply_make_stateful_transformation

        file = folder / f"openvino-{bits}.xml"
        core = openvino.Core()
        if not file.exists():
            model = core.read_model(folder / "onnx-32.onnx")
            names = [port.any_name for port in model.inputs if port.any_name.startswith("past_")]
            shapes = {port: port.partial_shape for port in model.inputs}
            for port, shape in shapes.items():
                shape[0] = 1
                model.reshape({port: shape})
            apply_make_stateful_transformation(model, {n: n.replace("past_key_values", "present") for n in names})
            if bits < 16:
                import nncf

                options = {8: {}, 4: {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 32, "all_layers": True}}
                model = nncf.compress_weights(model, **options[bits])
            openvino.save_model(model, file, compress_to_fp16=bits == 16)
        settings = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        self.request = core.compile_model(core.read_model(file), "CPU", settings).create_infer_request()
        self.length = 0

    def step(self, ids: Any, new: bool) -> Any:
        import numpy as np

        if new:
            self.request.reset_state()
            self.length = 0
        start, self.length = self.length, self.length + len(ids)
        feeds = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": np.arange(start, self.length)[None],
        }
        return self.request.infer(feeds)["logits"][0, -1]


class Torch(Model):
    """Hugging Face's GPT-2, eager; 16 bits: bfloat16."""

    def __init__(self, folder: Path, bits: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(THREADS)
        self.torch = torch
        kind = torch.float32 if bits == 32 else torch.bfloat16
        model = transformers.GPT2LMHeadModel.from_pretrained(folder / "huggingface", torch_dtype=kind)
        self.model = model.eval()
        self.past: Any = None

    def step(self, ids: Any, new: bool) -> Any:
        with self.torch.inference_mode():
            past = None if new else self.past
            out = self.model(self.torch.from_numpy(ids)[None], past_key_values=past, use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values
        return out.logits[0, -1].float().numpy()


class TorchCompiled(Torch):
    """The same, compiled by torch.compile for any length."""

    def __init__(self, folder: Path, bits: int) -> None:
        super().__init__(folder, bits)
        self.model = self.torch.compile(self.model, dynamic=True)


class LlamaCpp(Model):
    """F32 (keys and values too), F16, Q8_0 and Q4_0, made from the F32 file by llama.cpp's own quantisation."""

    kv_bytes = 2  # but for F32

    def __init__(self, folder: Path, bits: int) -> None:
        import llama_cpp

        self.library = llama_cpp
        source = folder / "gguf" / "model.gguf"
        file = source if bits == 32 else folder / f"llama-{bits}.gguf"
        if not file.exists():
            settings = llama_cpp.llama_model_quantize_default_params()
            kinds = {16: llama_cpp.LLAMA_FTYPE_MOSTLY_F16, 8: llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}
            settings.ftype = kinds.get(bits, llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0)
            settings.pure, settings.nthread = True, THREADS
            if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), settings):
                raise RuntimeError("llama_model_quantize failed")
        kv = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32} if bits == 32 else {}
        sizes = {"n_ctx": 0, "n_batch": 1024, "n_threads": THREADS, "n_threads_batch": THREADS}  # 0: the model's
        self.model = llama_cpp.Llama(str(file), **sizes, **kv, verbose=False)
        self.vocabulary = self.model.n_vocab()

    def step(self, ids: Any, new: bool) -> Any:
        import numpy as np

        if new:
            self.model.reset()
            self.model._ctx.kv_cache_clear()
        self.model.eval(ids.tolist())
        scores = self.library.llama_get_logits_ith(self.model._ctx.ctx, -1)
        return np.ctypeslib.as_array(scores, (self.vocabulary,)).copy()


class CTranslate2(Model):
    """Its converter's model of the Hugging Face folder, which goes from token to token by itself and tells of each."""

    def __init__(self, folder: Path, bits: int) -> None:
        import ctranslate2

        file, kind = folder / f"ctranslate2-{bits}", {32: "float32", 8: "int8"}[bits]
        if not (file / "model.bin").exists():
            import transformers
            from ctranslate2.converters.transformers import GPT2Loader

            model = transformers.GPT2LMHeadModel.from_pretrained(folder / "huggingface")
            loader = GPT2Loader()
            spec = loader.get_model_spec(model)
            loader.set_vocabulary(spec, [str(i) for i in range(model.config.vocab_size)])
            spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
            spec.validate()
            spec.optimize(quantization=kind)
            file.mkdir(exist_ok=True)
            spec.save(str(file))
        self.model = ctranslate2.Generator(str(file), device="cpu", compute_type=kind, intra_threads=THREADS)

    def run(self, ids: list[int], count: int) -> tuple[float, float]:
        times = [time.perf_counter()]
        self.model.generate_batch(
            [[str(i) for i in ids]],
            max_length=1 + count,
            min_length=1 + count,
            include_prompt_in_result=False,
            callback=lambda token: times.append(time.perf_counter()),  # None: go on
        )
        return times[1] - times[0], (times[-1] - times[1]) / max(count, 1)

    def scores(self, ids: list[int]) -> Any:
        import numpy as np

        return np.array(self.model.forward_batch([[str(i) for i in ids]]))[0, -1]


# Name, class, bits, and whether it runs in this interpreter (else in --python's).
PARTIES: dict[str, tuple[type[Model], tuple[int, ...], bool]] = {
    "gpt2np": (Gpt2np, (32, 16, 8, 4), True),
    "ONNX Runtime": (OnnxRuntime, (32, 8, 4), True),
    "OpenVINO": (OpenVino, (32, 16, 8, 4), False),
    "PyTorch": (Torch, (32, 16), False),
    "PyTorch compiled": (TorchCompiled, (32,), False),
    "llama.cpp": (LlamaCpp, (32, 16, 8, 4), False),
    "CTranslate2": (CTranslate2, (32, 8), False),
}
NOT_TRIED = (
    "Not tried: ONNX Runtime in 16 bits (no kernels for them on x86), PyTorch in 8 and 4 bits (packages of their own), "
    "CTranslate2 in 16 and 4 bits (other devices)."
)


def open_party(file: str, name: str, bits: int) -> dict[str, Callable[..., Any]]:
    import numpy as np

    model = PARTIES[name][0](Path(file), bits)

    def scores(prompts: list[list[int]], target: str) -> None:
        np.save(target, np.stack([model.scores(ids) for ids in prompts]))

    return {"run": model.run, "scores": scores}


def make_files(model: Path | None, work: Path) -> None:
    """The same weights as ONNX with past inputs, Hugging Face checkpoint and GGUF, in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    past = work / "past" / "model.onnx"
    if not past.exists():
        make = ["synth"] if model is None else ["convert", str(model)]
        gpt2np_command(*make, "--with-past", "-o", past.parent)
    for to, file in (("huggingface", "model.safetensors"), ("gguf", "model.gguf")):
        if not (work / to / file).exists():
            gpt2np_command("convert", past, "--to", to, "-o", work / to)
    if not (work / "onnx-32.onnx").exists():
        keep_last_position(past, work / "onnx-32.onnx")


def gpt2np_command(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "gpt2np", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def keep_last_position(source: Path, target: Path) -> None:
    """The graph with scores of the last position alone, and the head as a matrix that quantisers find."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(source)
    graph = model.graph
    head = next(node for node in graph.node if "logits" in node.output)
    turn = next(node for node in graph.node if head.input[1] in node.output)
    table = next(tensor for tensor in graph.initializer if tensor.name == turn.input[0])
    matrix = np.ascontiguousarray(numpy_helper.to_array(table).T)
    graph.initializer.append(numpy_helper.from_array(matrix, "lm_head"))
    for name, number in (("last_start", -1), ("last_end", np.iinfo(np.int64).max), ("last_axis", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array([number], np.int64), name))
    graph.node.remove(turn)
    slice_last = helper.make_node("Slice", [head.input[0], "last_start", "last_end", "last_axis"], ["last"])
    graph.node.insert(list(graph.node).index(head), slice_last)
    head.input[:] = ["last", "lm_head"]
    next(output for output in graph.output if output.name == "logits").type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, target)
