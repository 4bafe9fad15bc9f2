#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# cleanlab 2.9.0: the label quality score "confidence_weighted_entropy" for a model that is very sure, as fine-tuned ones often are.
# Expected: the score lies between 0 and 1, lower for labels that are less likely to be right, as its documentation says. So a right
#   label scores the higher, and a wrong one the lower, the surer the model is.
# Seen: so it is until the model is sure to one in a million. Beyond that both turn round. With three classes whose softmax leaves 1e-8
#   to each of the others, a right label scores 0.35 and a wrong one 0.86; an even prediction scores 0.46. At 1e-12 right labels score
#   almost 0, wrong ones almost 1, and where the softmax is exactly 0 and 1 both score 0. Logits that lie 20 apart are enough. The
#   other two scores, "self_confidence" and "normalized_margin", do as expected.
# Consequence: a list of suspicious labels by this score begins with the surest right ones, and ends with the surest wrong ones.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check cleanlab==2.9.0
"$work/venv/bin/python" - <<'PY'
import cleanlab
import numpy as np
from cleanlab.rank import get_label_quality_scores

print("cleanlab", cleanlab.__version__)
labels = np.array([0, 0, 0])  # the model agrees, disagrees, and cannot tell
scores = {}
for method in ("confidence_weighted_entropy", "normalized_margin", "self_confidence"):
    for rest in (1e-2, 1e-4, 1e-6, 1e-8, 1e-12):
        probabilities = np.array([[1 - 2 * rest, rest, rest], [rest, 1 - 2 * rest, rest], [1 / 3, 1 / 3, 1 / 3]])
        scores[method, rest] = right, wrong, even = get_label_quality_scores(labels, probabilities, method=method)
        print(f"{method}, {rest:g} for each other class: right {right:.2g}, wrong {wrong:.2g}, even {even:.2g}")

for (method, rest), (right, wrong, even) in scores.items():
    inverted = method == "confidence_weighted_entropy" and rest < 1e-7
    if not (right < even < wrong if inverted else wrong < even < right):
        raise SystemExit(f"Changed: {method} at {rest:g} is not as stated.")
probabilities = np.exp([[0.0, -20.0, -20.0], [-20.0, 0.0, -20.0]])
probabilities /= probabilities.sum(axis=1, keepdims=True)
right, wrong = get_label_quality_scores(labels[:2], probabilities, method="confidence_weighted_entropy")
print(f"logits 20 apart: right {right:.2g}, wrong {wrong:.2g}")
if not right < wrong:
    raise SystemExit("Changed: with logits 20 apart the right label scores higher.")
print("As stated: beyond one in a million the surest right labels score lowest, the surest wrong ones highest.")
PY
