"""SmolLM2-135M-Instruct as the GGUF file that its package carries, and the same weights at other precisions.

Rule: no test framework and no lmbridge engine here. Files are made once and kept beside the other real models.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.real.model import CACHE, VERSION, _alone, _fetch

NAME = "SmolLM2-135M-Instruct"


def real_gguf() -> Path:
    """The file, 98 MB; the first call fetches it.

    Raises:
        NoRealModelError: it cannot be fetched.
    """
    kept = CACHE / f"{NAME}-{VERSION}.Q4_1.gguf"
    with _alone():
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as work:
                _fetch(Path(work)).rename(kept)
    return kept


def plain_gguf(source: Path) -> Path:
    """The same weights as plain numbers of 32 bits, 652 MB: what llama.cpp multiplies without rounding."""
    kept = source.with_name(source.name.replace("Q4_1", "F32"))
    with _alone():
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as work:
                made = Path(work) / "plain.gguf"
                _write_plain(source, made)
                shutil.move(made, kept)
    return kept


def _write_plain(source: Path, target: Path) -> None:
    import gguf

    read: Any = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in read.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in read.tensors:
        weight: Any = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, weight.astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
