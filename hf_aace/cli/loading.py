# SPDX-License-Identifier: Apache-2.0
"""Load the images and the model of `hf-aace train`, and make the trainer."""

from dataclasses import fields

import torch
from datasets import DatasetDict, Image, IterableDatasetDict
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..config import AACEConfig
from ..vision.augmentation import Augmentation, AugmentedAACETrainer
from ..vision.datasets import load_image_dataset
from ..vision.images import image_transform
from ..vision.lora import add_lora
from ..vision.messages import first_line
from ..vision.metrics import compute_metrics_fn
from ..vision.models import freeze_backbone, load_classifier, load_model_and_processor
from ..vision.streaming import stream_image_dataset, transform_stream
from ..vision.weighted_loss import WeightedCrossEntropy, balanced_class_weights
from .checks import check_exists, check_metrics, naming_the_folder
from .options import DataArguments, ImagesArguments, ModelArguments, PretrainedArguments


logger = logging.get_logger(__name__)


def load_data(options: DataArguments, training_args: AACEConfig) -> DatasetDict | IterableDatasetDict:
    """
    Load the splits `train` and `test`, and `validation` if there are validation images.

    Args:
        options ([`DataArguments`]): The images.
        training_args ([`AACEConfig`]): Has the seed, and `max_steps` for `streaming`.

    Raises:
        `ValueError`: If the options do not go together or the dataset cannot be used.
    """
    seed, train_size = training_args.seed, options.train_size
    if not options.streaming:
        noise, validation = options.label_noise, options.validation_size
        return load_images(options, seed, train_size=train_size, label_noise=noise, validation_size=validation)
    if training_args.max_steps <= 0:
        raise ValueError(
            "`streaming` needs `max_steps`, the length of the training, as the number of images is not known."
        )
    if options.dataset_name == "digits":
        raise ValueError("The digits are in memory anyway: leave out `streaming`, or name another dataset.")
    for name, off in (("label_noise", 0), ("validation_size", 0), ("class_weights", "none")):
        if getattr(options, name) != off:
            raise ValueError(
                f"`{name}` needs all training labels before training, which `streaming` does not read: leave out one of the two."
            )
    with naming_the_folder("dataset_name", options.dataset_name):
        return stream_image_dataset(
            options.dataset_name,
            seed=seed,
            train_size=train_size,
            image_column_name=options.image_column_name,
            label_column_name=options.label_column_name,
            image_range=options.image_range,
        )


def load_images(options: ImagesArguments, seed: int, **changes) -> DatasetDict:
    """
    Load the splits of the dataset that `options` name; refuse one that cannot be used. `seed` draws what `changes` ask for,
    which are passed on to [`~hf_aace.vision.datasets.load_image_dataset`].
    """
    with naming_the_folder("dataset_name", options.dataset_name):
        images = {field.name: getattr(options, field.name) for field in fields(ImagesArguments)}
        return load_image_dataset(images.pop("dataset_name"), seed=seed, **images, **changes)


def load_pretrained(options: PretrainedArguments) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load the trained classifier that `options` name, and its image processor; refuse a name without such a model."""
    name = options.model_name_or_path
    check_exists("model_name_or_path", name)
    with naming_the_folder("model_name_or_path", name):
        return load_classifier(name, **options.source())


def make_trainer(
    dataset: DatasetDict | IterableDatasetDict,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: AACEConfig,
) -> tuple[AugmentedAACETrainer, DatasetDict | IterableDatasetDict]:
    """
    Load the model, and make the trainer.

    Args:
        dataset (`DatasetDict` or `IterableDatasetDict`): What [`load_data`] returned.
        model_args ([`ModelArguments`]): The model.
        data_args ([`DataArguments`]): Augmentation, class weights and metrics.
        training_args ([`AACEConfig`]): The training.

    Returns:
        `tuple`: The trainer, and the dataset as its model takes it.

    Raises:
        `ValueError`: If the options do not go together or there is no such model.
        `OSError`: If the repository to push to cannot be made.
    """
    if training_args.dataloader_drop_last and not data_args.streaming:
        images = len(dataset["train"])
        if images < training_args.train_batch_size * training_args.world_size:
            raise ValueError(
                f"`dataloader_drop_last` leaves nothing to train on, as the {images} training images do not fill a batch: leave "
                "it out, or give a smaller `per_device_train_batch_size`."
            )
    if training_args.load_best_model_at_end and "validation" not in dataset:
        logger.warning(
            "`load_best_model_at_end` chooses the checkpoint by the test images, which will then look better than new ones. "
            + ("Leave it out." if data_args.streaming else "Set images apart to choose by: `validation_size`.")
        )
    # The transform makes the columns that the model takes only when a batch is read.
    training_args.remove_unused_columns = False
    compute_metrics = compute_metrics_fn([name for name in data_args.metrics if name != "confusion_matrix"])
    id2label = dict(enumerate(dataset["train"].features["label"].names))
    check_metrics(compute_metrics, len(id2label), training_args)
    set_seed(training_args.seed)
    with naming_the_folder("model_name_or_path", model_args.model_name_or_path):
        model, processor = _load_model(model_args, training_args, id2label)
    augmentation = None
    if data_args.augmentation != "none" or data_args.mixup or data_args.cutmix:
        augmentation = Augmentation(
            data_args.augmentation,
            processor=processor,
            num_classes=len(id2label),
            mixup=data_args.mixup,
            cutmix=data_args.cutmix,
        )
    weights = None
    if data_args.class_weights == "balanced":
        weights = balanced_class_weights(dataset["train"]["label"][:], len(id2label))
    compute_loss_func = None  # the model's own
    # Most models leave out the division by micro-batches and processes that Trainer leaves to them (transformers#47688).
    shared = training_args.gradient_accumulation_steps > 1 or training_args.world_size > 1
    if weights is not None or (augmentation is not None and augmentation.soft_labels) or shared:
        compute_loss_func = WeightedCrossEntropy(weights, training_args.label_smoothing_factor)
    if data_args.streaming:
        dataset = transform_stream(dataset, processor, data_args.skip_corrupt_images, data_args.image_range)
    else:
        # Left encoded, so that the transform can name an image that cannot be decoded.
        transform = image_transform(processor, image_range=data_args.image_range)
        dataset = dataset.cast_column("image", Image(decode=False)).with_transform(transform)
    try:
        trainer = AugmentedAACETrainer(
            model=model,
            args=training_args,
            train_dataset=dataset["train"],
            eval_dataset=dataset.get("validation", dataset["test"]),
            processing_class=processor,
            compute_metrics=compute_metrics,
            compute_loss_func=compute_loss_func,
            augmentation=augmentation,
        )
    except (HTTPError, LocalTokenNotFoundError) as error:
        raise OSError(
            f"The repository to push to could not be made on the Hub: {first_line(error)}. "
            "Log in with `hf auth login`, or set `hub_token`."
        ) from error
    except RuntimeError as error:
        if "to be installed" not in str(error):  # a package that `report_to` needs
            raise
        raise ImportError(f"`report_to`: {first_line(error)}. Or give `--report_to none`.") from error
    if model_args.lora and trainer.is_fsdp_enabled:
        raise ValueError("`lora` does not go with FSDP, whose shards it could not merge. Use `ddp`.")
    return trainer, dataset


def _load_model(
    options: ModelArguments, training_args: AACEConfig, id2label: dict[int, str]
) -> tuple[nn.Module, BaseImageProcessor]:
    """Load the model, with the parameters to train set, and its image processor."""
    model, processor = load_model_and_processor(
        options.model_name_or_path, id2label, dtype=getattr(torch, options.dtype), **options.source()
    )
    if options.freeze_backbone:
        freeze_backbone(model)
    if options.lora:
        model = add_lora(
            model, rank=options.lora_rank, alpha=options.lora_alpha, target_modules=options.lora_target_modules
        )
        # Pushes during training would be of adapters, and the merged model could not be loaded beside them.
        training_args.hub_strategy = HubStrategy.END
    return model, processor
