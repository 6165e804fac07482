#!/usr/bin/env bash
# What to run where an accelerator is attached: records, tests, chapters. Ten minutes at most.
#
#     tools/on_accelerator.sh OUT [WHEELS]
#
# Takes the jax that python has (0.7.2 or newer, with CUDA 12, CUDA 13 or libtpu) and never
# replaces it. What else is missing comes from the folder WHEELS, without a network:
#
#     pip download --dest WHEELS $(bash tools/on_accelerator.sh --needs)
#
# OUT gets the records of `bench`, as chapter 10 takes them, loops.json, a log of each part,
# and summary.txt with their exit statuses. A part that fails stops no other, and the script
# then exits with 1. On a CPU it rehearses with tiny sizes. May be set: PYTHON; LIMIT, the
# seconds for all parts together; PATIENCE, a factor on the seconds of each, for a busy host.
set -uo pipefail
needs="jaxtyping safetensors huggingface_hub tqdm tokenizers matplotlib ipywidgets ipykernel
  nbclient pytest hypothesis beartype jsonschema optax"
if [[ "${1:-}" == --needs ]]; then
  echo $needs
  exit
fi
out=${1:?the folder for what is measured}
mkdir -p "$out" && out=$(cd "$out" && pwd)
wheels=${2:+$(cd "$2" && pwd)}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} all=${LIMIT:-600} failed=0
limit=$((all - 200)) # the last seconds are for tests and chapters
: > "$out/summary.txt"

part() { # part NAME SECONDS COMMAND...: run it, for no longer than that and what is left
  local name=$1 most=$((${PATIENCE:-1} * $2)) left=$((limit - SECONDS)) from=$SECONDS status
  shift 2
  ((left < most)) && most=$left
  if ((most < 10)); then
    status="left out: no time"
  else
    timeout --kill-after=5 "$most" "$@" > "$out/$name.log" 2>&1
    status=$?
  fi
  [[ $status == 0 ]] || failed=1
  echo "$name: $status, $((SECONDS - from)) s" | tee -a "$out/summary.txt"
  [[ $status == 0 ]]
}

if [[ -n $wheels ]]; then # beside the jax that is there
  "$python" -m venv --system-site-packages "$out/env"
  python=$out/env/bin/python
  part install 90 "$python" -m pip install --no-index --find-links "$wheels" $needs
fi
export PYTHONPATH=$PWD JAX_COMPILATION_CACHE_DIR=$out/compiled
kind=$("$python" -c "import jax; print(jax.devices()[0].platform)")
[[ -n $kind ]] || { echo "$python cannot start jax"; exit 1; }
"$python" -c "import jax; print('jax', jax.__version__, jax.devices())" | tee -a "$out/summary.txt"

sizes="130m 780m 2.7b" dtypes="float32 bfloat16" lengths=128,1024,4096
tests="tests/test_forms.py tests/test_model.py tests/test_generate.py tests/test_parity.py"
chapters="10_results 06_generation 08_hlo 09_roofline" how=""
if [[ $kind == cpu ]]; then
  sizes=tiny dtypes=float32 lengths=16,64 chapters=06_generation
  how="-k=oracle_in_float32 and chunked or prefill_then or near_zero or recorded and one_group"
fi
bench="$python -m ssdlib bench --repeats 3 --out $out --lengths $lengths"
for dtype in $dtypes; do
  for size in $sizes; do
    before=$failed how_much="--preset $size --dtype $dtype"
    [[ $size == tiny ]] && how_much="--model tiny --dtype $dtype"
    part "bench-$size-$dtype" 90 $bench $how_much || { # where uncached does not fit
      failed=$before
      part "cached-$size-$dtype" 60 $bench $how_much --what prefill,decode
    }
  done
done
part loops 90 "$python" tools/loops.py "$out/loops.json" "${sizes// /,}" "${dtypes// /,}"
limit=$all
part tests 120 "$python" -m pytest -q -p no:cacheprovider $tests ${how:+"$how"}
run='import sys, nbformat, nbclient
nb = nbformat.read(sys.argv[1], as_version=4)
where = {"metadata": {"path": sys.argv[2]}}
nbclient.NotebookClient(nb, timeout=600, resources=where).execute()'
for chapter in $chapters; do
  part "$chapter" 120 "$python" -W ignore -c "$run" "book/$chapter.ipynb" "$out"
done
rm -rf "$out/env" "$out/compiled"
exit $failed
