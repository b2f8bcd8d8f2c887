"""What is trained and travels: attached to a base model, selected from it, loaded back into it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.base import seeded
from models.config import PayloadConfig
from models.fold import widen
from models.layout import Layout
from models.personal import personal_names
from models.section import ConfigError, unknown
from models.trial import check_forward

Settings = dict[str, Any]


class Payload:
    """The trained part of a module: its named tensors, how to take them out and put them back.

    `parameters` are all that are trained. Of these `shared` travel, laid out as `layout`, and
    `personal` stay at the site, laid out as `personal_layout`.
    """

    def __init__(
        self, kind: str, module: Any, personal: str = "", fresh_modules: Sequence[str] = ()
    ) -> None:
        self.kind = kind
        self.module = module
        trained = {plain(n): p for n, p in module.named_parameters() if p.requires_grad}
        self.parameters: dict[str, nn.Parameter] = dict(sorted(trained.items()))
        kept = personal_names(list(self.parameters), personal, fresh_modules)
        self.shared = {n: p for n, p in self.parameters.items() if n not in kept}
        self.personal = {n: p for n, p in self.parameters.items() if n in kept}
        self.layout = Layout.of({name: p.float() for name, p in self.shared.items()})
        shapes = tuple(tuple(p.shape) for p in self.personal.values())
        self.personal_layout = Layout(tuple(self.personal), shapes)
        self.personal_start = self.select_personal()
        # What `models.fold` adds to the frozen weights, and the hooks that compute it.
        self.fold: Mapping[str, Tensor] = {}
        self.branches: list[RemovableHandle] = []

    @property
    def device(self) -> torch.device:
        """Where the payload's tensors are."""
        return next(iter(self.parameters.values())).device

    @property
    def lora_scale(self) -> float:
        """What LoRA multiplies B A by, alpha / rank unless set otherwise; 1 for other payloads.

        The mean over modules where `alpha_pattern` or `rank_pattern` set them apart.
        """
        layers = (m for m in self.module.modules() if isinstance(m, LoraLayer))
        scales = [float(scale) for layer in layers for scale in layer.scaling.values()]
        return sum(scales) / len(scales) if scales else 1.0

    @property
    def virtual_tokens(self) -> int:
        """Positions of the context that stand before every text."""
        return virtual_tokens(self.module)

    def select(self) -> dict[str, Tensor]:
        """Copies of the tensors that travel, float32 on the CPU, in the layout's order."""
        return _copies(self.shared)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Write what travelled into the module by name; raises LayoutError if it does not fit."""
        _write(tensors, self.layout, self.shared)

    def select_personal(self) -> dict[str, Tensor]:
        """Copies of the tensors that stay at the site, as `select` gives those that travel."""
        return _copies(self.personal)

    def load_personal(self, tensors: Mapping[str, Tensor]) -> None:
        """Write a site's own tensors into the module; raises LayoutError if they do not fit."""
        _write(tensors, self.personal_layout, self.personal)

    def save(self, folder: Path) -> None:
        """Write the payload in PEFT format, with its fold, or the whole model for `full`."""
        if self.kind == "full":
            self.module.save_pretrained(folder)
        else:
            self.module.save_pretrained(folder, save_embedding_layers=False)
            sort_lists(folder / "adapter_config.json")
            if self.fold:
                widen(self, folder)


def _copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in parameters.items()
    }


@torch.no_grad()
def _write(
    tensors: Mapping[str, Tensor], layout: Layout, parameters: Mapping[str, nn.Parameter]
) -> None:
    layout.check(tensors)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def virtual_tokens(module: Any) -> int:
    """Positions that a soft prompt or prefix takes of the context; 0 for other modules."""
    settings = getattr(module, "active_peft_config", None)
    if not isinstance(settings, peft.PromptLearningConfig):
        return 0
    return int(settings.num_virtual_tokens or 0)


def sort_lists(path: Path) -> None:
    """PEFT writes sets of module names in an order that changes with every process."""
    settings = json.loads(path.read_text())
    for value in settings.values():
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            value.sort()
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def attach(
    model: PreTrainedModel,
    config: PayloadConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    task: str = "causal-lm",
    fresh_modules: Sequence[str] = (),
    frozen: str = "",
    seed: int = 0,
) -> Payload:
    """Attach the payload that `config` names to `model`, which it freezes and changes in place.

    Modules named in `fresh_modules` (a classification head, say) are trained too, and travel unless
    `config.personal` keeps them at the site. Parameters with the part `frozen` in their name, such
    as `lora_A`, stay at their start and do not travel. Start values are drawn from `seed`. Raises
    ConfigError for an unknown kind or option, or one that the architecture does not support.
    """
    if config.kind == "full":
        model.requires_grad_(True)
        return _checked(Payload("full", model, config.personal, fresh_modules), task)
    # Values such as rank and module names only meet the architecture here, inside PEFT.
    try:
        with seeded(seed):
            settings = peft_config(config, model, task, fresh_modules)
            module = peft.get_peft_model(model, settings)
            if config.kind in ("soft-prompt", "prefix"):
                _start_prompt(module, config, tokenizer)
    except ConfigError:
        raise
    except (
        ValueError, TypeError, KeyError, NotImplementedError, AttributeError, ImportError,
    ) as error:  # fmt: skip
        raise ConfigError(
            f"Expected payload.kind={config.kind!r} to fit a {type(model).__name__}, but it does "
            f"not ({error}); change payload.target-modules, payload.options or payload.kind."
        ) from error
    _require_trained(module, fresh_modules, config.kind)
    keep_heads_precise(module)
    for name, parameter in module.named_parameters():
        if frozen and f".{frozen}." in name:
            parameter.requires_grad_(False)
    whole = module.to(model.device)
    return _checked(Payload(config.kind, whole, config.personal, fresh_modules), task)


def _checked(payload: Payload, task: str) -> Payload:
    """Refuse a payload that would lose its small updates to rounding, or computes wrongly."""
    for name, parameter in payload.parameters.items():
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"Expected what is trained in float32, got {name!r} in {parameter.dtype} with "
                f"payload.kind={payload.kind!r}, which would round small updates away; set "
                "model.dtype='float32' (train.precision may stay 'bfloat16')."
            )
    check_forward(payload.module, payload.kind, task)
    return payload


def keep_heads_precise(module: nn.Module) -> None:
    """Keep new heads in float32 on a base model of lower precision, as PEFT does with adapters."""
    wrappers = [m for m in module.modules() if isinstance(m, ModulesToSaveWrapper)]
    for head in [head for wrapper in wrappers for head in wrapper.modules_to_save.values()]:
        if any(parameter.dtype != torch.float32 for parameter in head.parameters()):
            head.float()
            head.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


def _require_trained(module: nn.Module, names: Sequence[str], kind: str) -> None:
    """Refuse methods that neither train nor save a head that was drawn at random."""
    for name in names:
        owned = [p for n, p in module.named_parameters() if f".{name}." in f".{plain(n)}"]
        if not any(parameter.requires_grad for parameter in owned):
            raise ConfigError(
                f"Expected payload.kind={kind!r} to train the new module {name!r} of this task, "
                "but the method cannot carry it; pick 'lora', 'soft-prompt', 'prefix' or 'full'."
            )


def plain(name: str) -> str:
    """Parameter name without PEFT's adapter name and wrappers, stable across PEFT versions."""
    parts = [part for part in name.split(".") if part not in ("default", "modules_to_save")]
    return ".".join(parts)


def _lora(config: PayloadConfig, model: PreTrainedModel) -> Settings:
    return {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}


def _llama_adapter(config: PayloadConfig, model: PreTrainedModel) -> Settings:
    layers = model.config.get_text_config().num_hidden_layers
    return {"adapter_len": config.num_virtual_tokens, "adapter_layers": layers}


def _nothing_special(config: PayloadConfig, model: PreTrainedModel) -> Settings:
    return {}


_KINDS: Mapping[str, tuple[str, Callable[[PayloadConfig, PreTrainedModel], Settings]]] = {
    "lora": ("LORA", _lora),
    "soft-prompt": ("PROMPT_TUNING", _nothing_special),
    "prefix": ("PREFIX_TUNING", _nothing_special),
    "adapter": ("ADAPTION_PROMPT", _llama_adapter),
}


def kinds() -> list[str]:
    """Every payload kind that `attach` knows."""
    others = {str(method.value) for method in PEFT_TYPE_TO_CONFIG_MAPPING}
    named = {peft_name for peft_name, _ in _KINDS.values()}
    return ["full", "split", *_KINDS, *sorted(m.lower().replace("_", "-") for m in others - named)]


def check_kind(config: PayloadConfig) -> Settings:
    """Parsed `options`; raises ConfigError for an unknown kind, or options that are no object."""
    if config.kind not in kinds():
        raise unknown("payload.kind", config.kind, kinds())
    try:
        options = json.loads(config.options or "{}")
    except json.JSONDecodeError as error:
        options = error
    if not isinstance(options, dict):
        raise ConfigError(
            f'Expected payload.options as a JSON object such as {{"use_dora": true}}, got '
            f"{config.options!r}."
        )
    return options


def _targets(config: PayloadConfig) -> str | list[str] | None:
    names = [name.strip() for name in config.target_modules.split(",") if name.strip()]
    if not names and config.kind == "lora":
        return "all-linear"  # on small models clearly better than PEFT's query and value only
    return "all-linear" if names == ["all-linear"] else names or None


def _config_class(kind: str) -> Any:
    if kind not in kinds():
        raise unknown("payload.kind", kind, kinds())
    methods = {str(method.value): cls for method, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return methods[_KINDS[kind][0] if kind in _KINDS else kind.upper().replace("-", "_")]


def prompting(kind: str) -> bool:
    """Whether virtual tokens stand before the text, so that a row holds one document only."""
    return kind == "adapter" or (
        kind not in ("full", "split") and issubclass(_config_class(kind), peft.PromptLearningConfig)
    )


def peft_config(
    config: PayloadConfig, model: PreTrainedModel, task: str, fresh_modules: Sequence[str]
) -> PeftConfig:
    """PEFT's own configuration of a payload; raises ConfigError for unknown kinds and options."""
    options = check_kind(config)
    cls = _config_class(config.kind)
    _, special = _KINDS.get(config.kind, ("", _nothing_special))
    common: Settings = {
        "task_type": "SEQ_CLS" if task == "classification" else "CAUSAL_LM",
        "target_modules": _targets(config),
        "num_virtual_tokens": config.num_virtual_tokens,
        "modules_to_save": list(fresh_modules) or None,
    }
    fields = cls.__dataclass_fields__
    settings = {k: v for k, v in common.items() if k in fields and v is not None}
    if bad := [name for name in options if name not in fields]:
        raise unknown(f"payload.options entry for {config.kind}", bad[0], fields)
    built = cls(**(settings | special(config, model) | options))
    assert isinstance(built, PeftConfig)
    return built


@torch.no_grad()
def _start_prompt(
    module: Any, config: PayloadConfig, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Set the soft prompt's start; PEFT's own text start would record a path of this machine."""
    prompt = module.prompt_encoder["default"].embedding.weight
    vocabulary = module.get_base_model().get_input_embeddings().weight
    if config.kind == "prefix" or config.init == "random":
        # PEFT draws with a standard deviation of 1, which would drown the text's own embeddings.
        prompt.normal_(std=float(vocabulary.float().std()))
        return
    ids = start_ids(config, len(prompt), len(vocabulary), tokenizer)
    prompt.copy_(vocabulary[ids.to(vocabulary.device)])


def start_ids(
    config: PayloadConfig,
    count: int,
    vocabulary: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Tensor:
    """Token ids (count,) whose embeddings a soft prompt starts from; raises ConfigError.

    With `payload.init='vocabulary'` they are drawn from torch's own generator.
    """
    if config.init == "vocabulary":
        return torch.randint(vocabulary, (count,))
    if tokenizer is None:
        raise ConfigError(
            "Expected a tokenizer with payload.init='text', got none; pass tokenizer=."
        )
    words = tokenizer(config.init_text, add_special_tokens=False)["input_ids"]
    if not words:
        raise ConfigError(
            f"Expected payload.init-text with words in it, got {config.init_text!r}; write the "
            "hard prompt to start from, or set payload.init='vocabulary'."
        )
    return torch.tensor(words).repeat(-(-count // len(words)))[:count]
