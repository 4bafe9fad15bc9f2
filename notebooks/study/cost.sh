#!/usr/bin/env bash
# What a step costs, by the size of the model and of the batch: a quarter of an hour on two CPU cores.
# Leaves a folder for each measurement in runs/cost, and all of them in runs/cost/cost.csv.
set -euo pipefail

vit() {
  echo "{\"hidden_size\": $1, \"intermediate_size\": $((4 * $1)), \"num_attention_heads\": $(($1 / 64)), \"num_hidden_layers\": $2, \"image_size\": 64, \"patch_size\": 8}"
}
convnext() {
  echo "{\"hidden_sizes\": [$1, $((2 * $1)), $((4 * $1)), $((8 * $1))], \"depths\": $2, \"image_size\": 64}"
}
measure() {
  hf-aace benchmark --fractions 0.125 --rounds 9 --warmup 2 --model_name_or_path "$1" --batch_size "$2" \
    --config_overrides "$3" --output_dir "runs/cost/$1-$4-$2"
}

for batch in 16 64 256; do
  measure vit "$batch" "$(vit 192 12)" 5M
  measure convnext "$batch" "$(convnext 48 '[2, 2, 8, 2]')" 5M
done
measure vit 16 "$(vit 128 5)" 1M
measure vit 16 "$(vit 384 12)" 21M
measure vit 16 "$(vit 768 12)" 85M
measure convnext 16 "$(convnext 24 '[2, 2, 6, 2]')" 1M
measure convnext 16 "$(convnext 96 '[3, 3, 9, 3]')" 28M
measure convnext 16 "$(convnext 128 '[3, 3, 27, 3]')" 88M

python - <<'END'
import csv
import json
from pathlib import Path

with open("runs/cost/cost.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["model", "parameters", "batch", "method", "seconds", "ratio", "lower_quartile", "upper_quartile"])
    for path in sorted(Path("runs/cost").glob("*/benchmark.json")):
        report = json.loads(path.read_text())
        for row in report["methods"]:
            numbers = [row["seconds"], row["ratio"], *row["ratio_quartiles"]]
            options = report["options"]
            writer.writerow(
                [options["model_name_or_path"], report["parameters"], options["batch_size"], row["name"]]
                + [f"{number:.4g}" for number in numbers]
            )
END
