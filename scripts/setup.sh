# Sourced by the other scripts, from the repository's root: an environment in .venv with requirements.txt, made once.
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "python3 is $(python3 --version 2>&1), 3.11 or newer is needed: install one and put it first on PATH" >&2
    exit 1
fi
if ! cmp -s requirements.txt .venv/requirements.txt; then
    echo "installing requirements.txt into .venv (a minute or two)"
    python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/requirements.txt # last: marks the environment as whole
fi
export PATH="$PWD/.venv/bin:$PATH"
