# SPDX-License-Identifier: Apache-2.0
"""`python -m hf_aace` is `hf-aace`: what `torchrun -m` and `accelerate launch -m` start."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
