"""A merged LoRA of an image or video model: one .safetensors file in the family of the inputs, names as they were.

Every module has scaling 1, in the way that all readers of the family agree on: kohya's files hold ``alpha = r`` beside
the factors; others hold no alpha, and diffusers' header says ``lora_alpha = r`` where the inputs' headers do.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from merge_engine.errors import writing
from merge_engine.formats.adapter import Adapter, Module
from merge_engine.formats.families import ALPHA, KOHYA
from merge_engine.formats.peft_writer import AdapterWriter
from merge_engine.formats.single_file import ADAPTER_METADATA, BASES
from merge_engine.report.card import HERE, code

# Fields of the header that are carried over where all inputs that have them agree.
_CARRIED = (*BASES, "ss_v2", "modelspec.implementation", "modelspec.resolution", "modelspec.prediction_type")
_LEGACY = (0x100000, 0x10000)  # where the bytes of the older of the two hashes begin, and how many they are
_NO_RANK = "9" * 12  # takes as much room in the header as any rank


class SingleFileWriter(AdapterWriter):
    """As `AdapterWriter`, with one file in place of PEFT's two. file_name: of the file in the folder."""

    def __init__(
        self,
        folder: Path,
        adapters: Sequence[Adapter],
        modules: Mapping[str, Module],
        dtype: torch.dtype,
        ranks: str = "one",
        *,
        file_name: str,
    ) -> None:
        self.file_name = file_name
        super().__init__(folder, adapters, modules, dtype, ranks)

    library = "diffusers"

    def _use(self) -> list[str]:
        where = f"pipeline.load_lora_weights({json.dumps(HERE)}, weight_name={json.dumps(self.file_name)})"
        return [
            *code("python", f"{where}  # pipeline: of diffusers, loaded as usual"),
            "",
            "or put the file into the folder `models/loras` of ComfyUI.",
        ]

    def trouble_of_servers(self) -> str | None:
        """None: servers of language models load no such file."""
        return None

    def _keys(self, module: Module) -> tuple[str, str]:
        return next(adapter for adapter in self._adapters if module.name in adapter.modules).keys(module.name)

    def _added(self) -> Sequence[str]:
        if self._adapters[0].family.name != KOHYA:
            return ()
        return [f"{name}{ALPHA}" for name in self._modules]

    def _complete(self) -> dict[str, int]:
        one = max(self._ranks.values())
        written = dict.fromkeys(self._ranks, one) if self._one_rank else self._ranks
        for key in self._added():
            self._weights.add(key, torch.tensor(float(written[key.removesuffix(ALPHA)])))
        metadata = self._metadata(one)
        self._weights.close(metadata)
        if self._one_rank:
            self._made_one(metadata)
        _write_hashes(self._file)
        return written

    def _metadata(self, rank: int | None) -> dict[str, str]:
        given = [adapter.metadata for adapter in self._adapters]
        number = _NO_RANK if rank is None else str(rank)
        metadata = {"format": "pt", "sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
        for key in _CARRIED:
            values = {header[key] for header in given if header.get(key)}
            if len(values) == 1:
                metadata |= {key: values.pop()}
        metadata |= {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.title": Path(self.file_name).stem,
            "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(_now())),
            "modelspec.merged_from": ", ".join(adapter.name for adapter in self._adapters),
        }
        if self._adapters[0].family.name == KOHYA:
            metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": number, "ss_network_alpha": number}
            if any(any(size != 1 for size in module.a_shape[2:]) for module in self._modules.values()):
                metadata["ss_network_args"] = json.dumps({"conv_dim": number, "conv_alpha": number})
        elif self._one_rank and any(ADAPTER_METADATA in header for header in given):
            metadata[ADAPTER_METADATA] = json.dumps(self._components(number), indent=2, sort_keys=True)
        return metadata

    def _components(self, number: str) -> dict[str, object]:
        """PEFT's configuration of every component, with its name before each field."""
        headers = [json.loads(adapter.metadata.get(ADAPTER_METADATA, "{}")) for adapter in self._adapters]
        names = {key.rpartition(".")[0] for header in headers for key in header}
        if "" not in names:  # the parts of a pipeline: "transformer", "text_encoder"
            names |= {name.split(".")[0] for name in self._modules}
        fields: dict[str, object] = {}
        for component in sorted(names):
            start = f"{component}." if component else ""
            modules = [name.removeprefix(start) for name in sorted(self._modules) if name.startswith(start)]
            config = {"r": int(number), "lora_alpha": int(number), "rank_pattern": {}, "alpha_pattern": {}}
            # One pattern, since PEFT takes the names of a list for ends of names, and other layers may end so.
            targets = "|".join(map(re.escape, modules))
            fields |= {f"{start}{key}": value for key, value in {**config, "target_modules": targets}.items()}
        return fields

    def _describe(self, written: Mapping[str, int]) -> str | None:
        """Nothing to write: the header says all. The name of the base model."""
        return next((adapter.base_model for adapter in self._adapters if adapter.base_model), None)


def _now() -> float:
    return float(os.environ.get("SOURCE_DATE_EPOCH", time.time()))


def _write_hashes(file: Path) -> None:
    """Put the hashes that users' tools know a file by into its header, in place.

    sshs_model_hash: sha256 of all bytes after the header. sshs_legacy_hash: the first 8 digits of the sha256 of the
    64 KiB at 1 MiB; of no bytes in a file that ends before.
    """
    with writing(file), open(file, "r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(length)

        def put(key: str, digits: str) -> None:
            opened.seek(8 + header.index(f'"{key}":"'.encode()) + len(key) + 4)
            opened.write(digits.encode())

        model = hashlib.sha256()
        while piece := opened.read(1 << 20):
            model.update(piece)
        put("sshs_model_hash", model.hexdigest())
        opened.seek(_LEGACY[0])
        put("sshs_legacy_hash", hashlib.sha256(opened.read(_LEGACY[1])).hexdigest()[:8])
