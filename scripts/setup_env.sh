# Find or make the Python that the other scripts run: source this, then call `setup_env [more requirements files]`.
#
# It sets PYTHON. If the active Python (or $PYTHON) has the requirements it is used as it is; otherwise .venv in the project's
# folder is, which is made from requirements.txt when there is none, or when the requirements have changed. Also preloads
# jemalloc, where it is installed: PyTorch on a CPU is faster with it.

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

_make_venv() {
    local venv=$_root/.venv stamp
    stamp=$venv/.installed-$(cat "${_requirements[@]}" | cksum | cut -d ' ' -f 1)
    PYTHON=$venv/bin/python
    if [ -e "$stamp" ] && [ -x "$PYTHON" ]; then
        return
    fi
    if ! "$_active" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: '$_active' is no Python 3.10 or newer; name one by PYTHON=/path/to/python3" >&2
        return 1
    fi
    mkdir -p "$venv" || return 1
    exec 9>"$venv/.lock"
    if command -v flock >/dev/null; then flock 9; fi # one at a time; the second finds everything there
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$_active" -m venv "$venv" || {
        echo "error: could not make $venv; on Debian and Ubuntu: apt install python3-venv" >&2
        return 1
    }
    if ! "$PYTHON" "$_root/scripts/check_requirements.py" "${_requirements[@]}" >/dev/null 2>&1; then
        echo "installing the requirements into $venv, this once (6 GB with CUDA)" >&2
        local file arguments=()
        for file in "${_requirements[@]}"; do arguments+=(-r "$file"); done
        "$PYTHON" -m pip install --quiet "${arguments[@]}" || {
            echo "error: pip could not install the requirements, see above. If it could not reach the package index, check" \
                "the network (a proxy: HTTPS_PROXY; a mirror: PIP_INDEX_URL) and run this again: it goes on from here" >&2
            return 1
        }
    fi
    touch "$stamp"
    exec 9>&-
}

_preload_jemalloc() {
    local library
    [ "$(uname)" = Linux ] && [ -z "${LD_PRELOAD:-}" ] || return 0
    # awk reads to the end: if it stopped early, ldconfig might die of the closed pipe, and the script with it.
    library=$(PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null | awk '/libjemalloc\.so\.2 / && !found++ { print $NF }')
    # Freed memory is kept for half a minute: page faults cost more than anything else. Kept for ever (-1), it grows
    # without end in processes that read images. Without oversize_threshold:0 it is not kept at all from 8 MiB on.
    local conf=${MALLOC_CONF:-oversize_threshold:0,dirty_decay_ms:30000,muzzy_decay_ms:0}
    if [ -n "$library" ] && [ -z "$(LD_PRELOAD=$library MALLOC_CONF=$conf env true 2>&1)" ]; then
        export LD_PRELOAD=$library MALLOC_CONF=$conf
    fi
}

setup_env() {
    _requirements=("$_root/requirements.txt" "$@")
    _active=${PYTHON:-python3}
    if "$_active" "$_root/scripts/check_requirements.py" "${_requirements[@]}" >/dev/null 2>&1; then
        PYTHON=$_active
    else
        _make_venv || exit 1
    fi
    _preload_jemalloc
}

# launch SCRIPT [flags]: become that script, or by torchrun NPROC processes of it.
launch() {
    if [ "${NPROC:-1}" = 1 ]; then
        exec "$PYTHON" "$@"
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # or torchrun warns; sampling on a CPU shares out the cores itself
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" "$@"
}

# sample KIND DEMO [flags]: become sample_KIND_ddp.py, with the configuration that CONFIG names, from here or from the project's
# folder. Without flags DEMO is that configuration, and without CONFIG and NPROC either, sample_KIND.py makes its grid.
sample() {
    local kind=$1 demo=$_root/$2 scripts=$_root/autoregressive/sample
    shift 2
    if [ $# -eq 0 ] && [ -z "${CONFIG:-}${NPROC:-}" ]; then
        exec "$PYTHON" "$scripts/sample_$kind.py" --config "$demo"
    fi
    if [ $# -eq 0 ]; then CONFIG=${CONFIG:-$demo}; fi
    if [ -n "${CONFIG:-}" ]; then
        if [ ! -e "$CONFIG" ] && [ -e "$_root/$CONFIG" ]; then CONFIG=$_root/$CONFIG; fi
        set -- --config "$CONFIG" "$@"
    fi
    launch "$scripts/sample_${kind}_ddp.py" "$@"
}
