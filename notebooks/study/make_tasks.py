# SPDX-License-Identifier: Apache-2.0
"""Two tasks out of one: the digits 0 to 5 to train on first, the digits 6 to 9 to fine-tune on."""

from datasets import ClassLabel, DatasetDict, Features, Image

from hf_aace.vision.datasets import load_image_dataset


def digits_between(first: int, last: int) -> DatasetDict:
    digits = load_image_dataset("digits", seed=0)
    digits = digits.filter(lambda label: first <= label <= last, input_columns="label")
    names = [str(name) for name in range(first, last + 1)]
    features = Features(image=Image(), label=ClassLabel(names=names))
    return digits.map(lambda label: {"label": label - first}, input_columns="label", features=features)


digits_between(0, 5).save_to_disk("runs/study/digits-0-5")
digits_between(6, 9).save_to_disk("runs/study/digits-6-9")
