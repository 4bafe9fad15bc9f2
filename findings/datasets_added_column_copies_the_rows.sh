#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# datasets 5.2.0: `Dataset.add_column` on a part of a dataset that `save_to_disk` wrote and `load_from_disk` mapped into memory.
# Expected: the new column is held in memory beside the mapped rows, as it is where the column is added to the whole dataset; nothing is
#   written, and `select`, which is called for the part, copies no rows.
# Seen: all rows of the part, with all their columns, are copied into a new file `cache-*.arrow` in the folder of the saved dataset, and
#   the new dataset reads that copy. It stays there. Each other part leaves another copy: adding 8 bytes a row to two halves of 3 MB of rows
#   doubles the folder. The same holds after `shuffle`. With `datasets.disable_caching()` the copy goes into a temporary folder.
# Consequence: labels that are replaced in a subset of a data set of images fill the disk of whoever owns the folder with images, and need
#   the right to write to it.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, load_from_disk

datasets.disable_progress_bars()
print("datasets", datasets.__version__)
generator = np.random.default_rng(0)
rows = {"image": [generator.bytes(10_000) for _ in range(300)], "label": list(range(300))}
Dataset.from_dict(rows).save_to_disk("saved")


def megabytes():
    return sum(file.stat().st_size for file in Path("saved").iterdir()) / 1e6


def grown(make):
    before = megabytes()
    made = make()
    growth = megabytes() - before
    return made, growth


data = load_from_disk("saved")
print(f"saved: {megabytes():.1f} MB")
_, whole = grown(lambda: data.add_column("score", [0.5] * 300))
halves = [data.select(range(start, 300, 2)) for start in (0, 1)]
copies = [grown(lambda half=half: half.add_column("score", [0.5] * 150))[1] for half in halves]
_, shuffled = grown(lambda: data.shuffle(seed=0).add_column("score", [0.5] * 300))
datasets.disable_caching()
_, without = grown(lambda: data.select(range(10, 90)).add_column("score", [0.5] * 80))
print(f"a column added to the whole: + {whole:.1f} MB; to each half: + {copies[0]:.1f} and + {copies[1]:.1f} MB")
print(f"to the whole after shuffle: + {shuffled:.1f} MB; to a part with caching disabled: + {without:.1f} MB")

if not (whole == 0 and min(copies) > 1.4 and shuffled > 2.9 and without == 0):
    raise SystemExit("Changed: the folder has not grown as stated.")
print("As stated: a column that is added to a selection copies its rows into the folder of the saved dataset.")
PY
