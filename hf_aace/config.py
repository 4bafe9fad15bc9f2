# SPDX-License-Identifier: Apache-2.0
"""The settings of sharpness-aware training: a dataclass beside `TrainingArguments`, and the methods by name."""

import math
import re
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar, Literal, get_args

from transformers import TrainingArguments


# The settings of each method's paper. The values of rho are those of the papers of SAM (arXiv 2010.01412) and ASAM (arXiv
# 2102.11600) for small images; that of AACE (arXiv 2406.14329) is this library's, for fine-tuning with AdamW.
METHODS: dict[str, dict[str, Any]] = {
    "aace": {
        "perturbation_loss": "aace",
        "normalize_perturbation": False,
        "adaptive_perturbation": False,
        "rho": 0.01,
    },
    "sam": {
        "perturbation_loss": "cross_entropy",
        "normalize_perturbation": True,
        "adaptive_perturbation": False,
        "rho": 0.05,
    },
    "asam": {
        "perturbation_loss": "cross_entropy",
        "normalize_perturbation": True,
        "adaptive_perturbation": True,
        "rho": 0.5,
    },
}
# The default rho of each method for `perturb_modules="norm"`, where steps have to be longer: the smallest value that was best on
# validation images in a study of digits (notebooks/study); in fine-tuning on photographs 1 to 3 were best. Not measured for ASAM,
# which is nearly SAM where weights are near 1.
_RHO_OF_NORM_LAYERS = {"aace": 10.0, "sam": 1.0, "asam": 1.0}


def perturbs(args: "AACEArguments", step: int) -> bool:
    """Tell whether the optimizer step with this number, from 0, is perturbed."""
    return args.rho != 0 and step % args.perturb_every == 0


def method_title(args: "AACEArguments") -> str:
    """
    Return the short name of a method for tables, plots and model cards.

    Args:
        args ([`AACEArguments`]): The settings.

    Returns:
        `str`: `"Trainer"` for plain training, else `"AACE"`, `"SAM"` or `"ASAM"`, with what its settings change.
    """
    if args.rho == 0:
        return "Trainer"
    if args.perturbation_loss == "aace":
        changes = ["adaptive"] * args.adaptive_perturbation + ["normalized"] * args.normalize_perturbation
        return ", ".join(["AACE", *changes])
    name = "ASAM" if args.adaptive_perturbation else "SAM"
    return name if args.normalize_perturbation else f"{name}, not normalized"


@dataclass
class AACEArguments:
    """
    The fields that sharpness-aware training adds to any `TrainingArguments`. [`AACEConfig`] is the two together; to
    add them to arguments of your own, write `class MyConfig(AACEArguments, MyTrainingArguments)` as a dataclass.

    See [`AACEConfig`] for the fields.
    """

    method: Literal["aace", "sam", "asam"] | None = field(
        default=None,
        metadata={
            "help": "The settings of a paper by name: `aace` (the default), `sam` or `asam`. It sets `perturbation_loss`, "
            "`normalize_perturbation`, `adaptive_perturbation` and `rho`; one of them given beside it wins."
        },
    )
    # The default None of the following four becomes the method's value when the object is made.
    rho: float = field(
        default=None,
        metadata={
            "help": "Size of the ascent step, >= 0. A step size (the factor of the ascent gradient), or with "
            "`normalize_perturbation` the length of the step. 0 is plain training. By default that of the method: 0.01 for "
            "`aace`, 0.05 for `sam`, 0.5 for `asam`; with `perturb_modules norm` 10, 1 and 1."
        },
    )
    perturbation_loss: Literal["aace", "cross_entropy"] = field(
        default=None,
        metadata={
            "help": "The loss whose gradient gives the ascent step: `aace`, or `cross_entropy` as in SAM. By default that of "
            "the method."
        },
    )
    normalize_perturbation: bool = field(
        default=None,
        metadata={
            "help": "Divide the ascent step by its gradient's norm, so that `rho` is a length, as in SAM. By default as the "
            "method does."
        },
    )
    adaptive_perturbation: bool = field(
        default=None,
        metadata={
            "help": "Scale the ascent gradient by the squared weights, element by element, as in ASAM. By default as the "
            "method does."
        },
    )
    aace_target: Literal["adaptive", "uniform", "random"] = field(
        default="adaptive",
        metadata={
            "help": "The adversarial target over the wrong classes: the model's own probabilities (`adaptive`, the "
            "method), the same for each (`uniform`), or one drawn at random (`random`). The last two are ablations."
        },
    )
    ascent_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Share of each batch that the ascent pass uses, in (0, 1]: its first samples, at least two, and with "
            "BatchNorm twelve, if the batch has them."
        },
    )
    ascent_scope: Literal["micro_batch", "full_batch"] = field(
        default="micro_batch",
        metadata={
            "help": "Under gradient accumulation: each micro-batch perturbs by its own gradient (`micro_batch`), or "
            "all of them by the gradient over the whole accumulated batch (`full_batch`)."
        },
    )
    sync_ascent: bool = field(
        default=False,
        metadata={
            "help": "With several processes: perturb by the gradient averaged over them instead of by each one's own. FSDP2 "
            "always does."
        },
    )
    perturb_every: int = field(
        default=1,
        metadata={"help": "Perturb on every n-th optimizer step; the others are plain steps."},
    )
    ascent_every: int = field(
        default=1,
        metadata={
            "help": "Take an ascent pass on every n-th optimizer step; perturbed steps between reuse its gradient."
        },
    )
    perturb_modules: str | None = field(
        default=None,
        metadata={
            "help": "The trainable parameters to perturb: `norm` for those of the normalization layers (of all kinds, by "
            "the type of the layer), or a regular expression, searched in the parameter names. All by default."
        },
    )

    _base: ClassVar[str | None] = None  # the method whose values fill the fields that were not given
    _applied_method: ClassVar[str | None] = None  # `method` when `_apply_method` last ran
    _given: ClassVar[frozenset[str]] = frozenset()  # the fields of a method that were given

    def __post_init__(self):
        self.check_aace_arguments()
        if isinstance(self, TrainingArguments):
            super().__post_init__()

    def __setattr__(self, name: str, value: Any) -> None:
        # A value that was given may equal the one that the method would set, and is to stay when the method changes.
        if name in METHODS["aace"]:
            self._given = self._given - {name} if value is None else self._given | {name}
        super().__setattr__(name, value)

    def _apply_method(self) -> None:
        """Set the fields that were not given as the method has them."""
        if self.method not in (None, *METHODS):
            raise ValueError(f"`method` must be one of {list(METHODS)}, or left out, got {self.method!r}.")
        if self._base is None or self.method != self._applied_method:
            self._base = self.method or "aace"
        settings, given = METHODS[self._base], self._given
        for name in settings.keys() - given:
            super().__setattr__(name, settings[name])
        if "rho" not in given and self.perturb_modules == "norm":
            for name, row in METHODS.items():
                if all(getattr(self, key) == value for key, value in row.items() if key != "rho"):
                    super().__setattr__("rho", _RHO_OF_NORM_LAYERS[name])
        changed = [name for name in settings if name in given - {"rho"} and getattr(self, name) != settings[name]]
        if self.method is not None and changed and len(given) == len(settings):
            raise ValueError(
                f"`method={self.method!r}` was given together with all that it sets, of which "
                + ", ".join(f"`{name}={getattr(self, name)!r}`" for name in changed)
                + " is not its own. Leave out `method`, or the fields. (`dataclasses.replace` copies them all.)"
            )
        if changed:
            self.method = None  # the settings are of no method's paper any more
        self._applied_method = self.method

    def check_aace_arguments(self) -> None:
        """
        Check the fields that this class adds. Called when an [`AACEConfig`] or a trainer is made, and again when
        training starts, since a hyperparameter search or a callback may have set them meanwhile.

        Raises:
            `ValueError`: If a field has a value outside its range; the message names the field, the value and the fix.
        """
        self._apply_method()
        for name in ("rho", "ascent_fraction", "perturb_every", "ascent_every"):
            value = getattr(self, name)
            if not isinstance(value, Real):  # YAML reads `1e-2` as a string
                raise ValueError(f"`{name}` must be a number, got {value!r}. (In a YAML file write 1e-2 as 0.01.)")
        for name in ("rho", "ascent_fraction"):
            # Trainer's `hyperparameter_search` gives a value the type of the one before: a whole number would cut it to 0.
            super().__setattr__(name, float(getattr(self, name)))
        if not (math.isfinite(self.rho) and self.rho >= 0):
            raise ValueError(f"`rho` must be a finite number >= 0, got {self.rho}. Use 0 for plain training.")
        if not 0 < self.ascent_fraction <= 1:
            raise ValueError(
                f"`ascent_fraction` must lie in (0, 1], got {self.ascent_fraction}. Use 1 for the whole batch."
            )
        for name, meaning in {"perturb_every": "perturb", "ascent_every": "take an ascent pass"}.items():
            value = getattr(self, name)
            if not (value >= 1 and value % 1 == 0):  # infinity and NaN neither
                raise ValueError(
                    f"`{name}` must be a whole number of steps >= 1, got {value}. Use 1 to {meaning} on every step."
                )
        for name in ("perturbation_loss", "aace_target", "ascent_scope"):
            choices = get_args(AACEArguments.__annotations__[name])
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {list(choices)}, got {getattr(self, name)!r}.")
        if self.perturb_modules is not None:
            try:
                re.compile(self.perturb_modules)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"`perturb_modules` must be 'norm' or a regular expression, got {self.perturb_modules!r}: {error}."
                ) from error


def method_and_settings(args: AACEArguments) -> str:
    """Return the title of a method, its `rho`, and every other field that is not at its default."""
    if args.rho == 0:
        return method_title(args)
    others = [option for option in fields(AACEArguments) if option.name not in ("method", *METHODS["aace"])]
    changed = [f"{each.name} {value}" for each in others if (value := getattr(args, each.name)) != each.default]
    return ", ".join([method_title(args), f"rho {args.rho:g}", *changed])


_DEFAULTS = AACEArguments()


def aace_arguments(args: TrainingArguments) -> AACEArguments:
    """Return the settings of sharpness-aware training in `args`; for plain arguments the defaults."""
    return args if isinstance(args, AACEArguments) else _DEFAULTS


@dataclass
class AACEConfig(AACEArguments, TrainingArguments):
    r"""
    Configuration of [`AACETrainer`]: every field of [`~transformers.TrainingArguments`], and the following.

    The ascent step moves the weights from `w` to `w'`, where the training loss is higher; the gradient of the training
    loss at `w'` then goes to the optimizer, at `w`. With `g` the gradient of the mean ascent loss at `w`:

    | `normalize_perturbation` | `adaptive_perturbation` | the step `w' - w`, up to its sign  |
    |--------------------------|-------------------------|------------------------------------|
    | `False`                  | `False`                 | `rho * g`                          |
    | `True`                   | `False`                 | `rho * g / norm(g)`                |
    | `False`                  | `True`                  | `rho * w**2 * g`                   |
    | `True`                   | `True`                  | `rho * w**2 * g / norm(abs(w) * g)`|

    Args:
        method (`str`, *optional*):
            Sets the following four fields as a paper has them. A field that is given wins; if it differs from the paper's, `method`
            becomes `None`, unless the field is `rho`.

            - `"aace"`, the default (Ratchatorn & Tanaka, [arXiv 2406.14329](https://huggingface.co/papers/2406.14329)):
              `perturbation_loss="aace"`, not normalized, `rho=0.01`, which is for fine-tuning with AdamW. The paper has 0.2,
              with SGD from scratch.
            - `"sam"` (Foret et al., [arXiv 2010.01412](https://huggingface.co/papers/2010.01412)):
              `perturbation_loss="cross_entropy"`, normalized, `rho=0.05`.
            - `"asam"` (Kwon et al., [arXiv 2102.11600](https://huggingface.co/papers/2102.11600)): as `"sam"`, and adaptive,
              `rho=0.5`.
        rho (`float`, *optional*):
            Size of the ascent step, `>= 0`. Un-normalized it is a step size, in units of weight per unit of gradient;
            with `normalize_perturbation` it is a length in weight space. Independent of accumulation steps, number of
            processes, label smoothing and the fp16 loss scale. The default is the method's; with
            `perturb_modules="norm"`, whose steps are longer, 10 for AACE and 1 for SAM and ASAM. `0` is plain training, bit for
            bit.
        perturbation_loss (`str`, *optional*):
            The loss whose gradient gives the ascent step: `"aace"` (descended: away from the true class) or
            `"cross_entropy"` (ascended, as SAM does). Always the mean over the samples, without label smoothing.
        normalize_perturbation (`bool`, *optional*):
            Divide the step by the norm of the gradient.
        adaptive_perturbation (`bool`, *optional*):
            Scale the step by the squared weights, element by element.
        aace_target (`str`, *optional*, defaults to `"adaptive"`):
            The adversarial target over the wrong classes: `"adaptive"` (the model's own probabilities, the method),
            `"uniform"`, or `"random"` (one wrong class drawn for each sample). The last two are the paper's ablations.
            Only for `perturbation_loss="aace"`.
        ascent_fraction (`float`, *optional*, defaults to `1.0`):
            Share of each batch that the ascent pass uses, in `(0, 1]`: its first `round(ascent_fraction * batch)` samples, at
            least two, if the batch has them. The descent pass always uses the whole batch. BatchNorm takes its running
            statistics from the ascent pass: a model that has it uses at least twelve samples, or the whole batch.
        ascent_scope (`str`, *optional*, defaults to `"micro_batch"`):
            Under gradient accumulation, what one perturbation is computed from: each `"micro_batch"` for itself, or
            the `"full_batch"` that makes up the optimizer step.
        sync_ascent (`bool`, *optional*, defaults to `False`):
            With several processes, whether to perturb by the gradient averaged over them (that of the mean over all their
            samples) instead of by each one's own. Costs one all-reduce more. With FSDP2 it is always so.
        perturb_every (`int`, *optional*, defaults to `1`):
            Perturb on every n-th optimizer step; the steps between are plain.
        ascent_every (`int`, *optional*, defaults to `1`):
            Take an ascent pass on every n-th optimizer step only; perturbed steps between move the weights along the
            gradient of the last one again (of its last micro-batch, with `ascent_scope="micro_batch"` under accumulation; one
            that is not finite skips them all).
            That gradient is kept, in memory of the size of the perturbed parameters, but in no checkpoint: the step after a
            save takes an ascent pass of its own. BatchNorm updates its running statistics on steps with an ascent pass only:
            they follow the weights more slowly. A warning says when the training is too short for that.
        perturb_modules (`str`, *optional*):
            The trainable parameters to perturb. Defaults to all. `"norm"` means those of the normalization layers (SAM-ON,
            Müller et al., [arXiv 2306.04226](https://huggingface.co/papers/2306.04226)), less than a hundredth of all: the
            ascent then computes no gradient of the other weights, which saves a third of its operations (none in a compiled
            model), and copies the perturbed ones only. Anything else is a regular expression, searched (`re.search`) in the names
            of the parameters. A normalization layer is told by its type, not its name: torch's `LayerNorm`, `GroupNorm`,
            `RMSNorm`, BatchNorm and InstanceNorm, and every class with "norm" in its name; of it the parameters `weight` and
            `bias` with at most one dimension larger than 1 count.

    Raises:
        `ValueError`: If a field has a value outside its range; the message names the field, the value and the fix.
    """
