#!/bin/sh
# Makes a virtual environment and installs Millrace into it, every version pinned by constraints.txt.
#   usage: deploy/setup.sh VENV [EXTRA...]     e.g. deploy/setup.sh .venv dev
# Without an NVIDIA GPU the small CPU build of torch is tried first, from TORCH_INDEX_URL; where that index can't be
# reached within seconds the ordinary one is used. Set TORCH_INDEX_URL= (empty) to skip the attempt.
set -eu

venv=$1
shift
extras=$(IFS=,; printf '%s' "$*")
python=${PYTHON:-python3}
torch=$(grep '^torch==' constraints.txt)
cpu_index=${TORCH_INDEX_URL-https://download.pytorch.org/whl/cpu}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed, $("$python" --version 2>&1) was found: set PYTHON=/path/to/python3.11" >&2
    exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check --quiet"

if ! "$venv/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '${torch#torch==}')" 2>/dev/null; then
    echo "installing $torch"
    if [ -n "$cpu_index" ] && [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
        $pip install --retries 0 --timeout 5 --index-url "$cpu_index" "$torch" 2>/dev/null ||
            echo "  $cpu_index does not answer: using the ordinary index"
    fi
    $pip install -c constraints.txt "$torch"
fi
echo "installing millrace${extras:+ with $extras}"
# EDITABLE= (empty) copies the packages into the environment instead of pointing at this folder.
# shellcheck disable=SC2086  # empty is no word
$pip install -c constraints.txt ${EDITABLE--e} ".${extras:+[$extras]}"
