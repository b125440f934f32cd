"""The verb that completes command lines, by a script made from the verbs and the settings."""

from __future__ import annotations

from neftune_dist.arguments import VERBS, argument, verb
from neftune_dist.config import KNOBS, shipped_configs
from neftune_dist.distributed import outcome

# bash splits NAME=VALUE into three words, zsh does not. A space follows a word unless its value, or
# the content of a folder, does. `-o default`: the shell itself completes what begins with ~.
_SCRIPT = r"""_neftune_dist() {{
  local configs="{configs}" settings="{settings}"
  local words='' files=1 prefix='' word IFS=$'\n'
  local current=${{COMP_WORDS[COMP_CWORD]}} name=${{COMP_WORDS[COMP_CWORD-1]}}
  if [[ $current == '=' ]]; then current=''
  elif [[ $name == '=' ]]; then name=${{COMP_WORDS[COMP_CWORD-2]}}
  elif [[ $current == *=* ]]; then name=${{current%%=*}} current=${{current#*=}} prefix="$name="
  elif [[ $name != -* ]]; then name=''
  fi
  case $name in
{values}
    ''|{flags}) case $COMP_CWORD-${{COMP_WORDS[1]}} in
      1-*) files='' words="{verbs}
--help
--version" ;;
{verb_words}
    esac ;;
  esac
  COMPREPLY=($(
    compgen -W "$words" -- "$current" | while read -r word; do
      [[ $word == *= ]] && echo "$word" || echo "$prefix$word "
    done
    [[ -z $files || $current == '~'* ]] || for word in "${{current//\\/}}"*; do
      [[ -d $word ]] && printf '%s%q/\n' "$prefix" "$word"
      [[ -f $word ]] && printf '%s%q \n' "$prefix" "$word"
    done
  ))
}}
complete -o nospace -o default -F _neftune_dist neftune-dist"""


# What completes a verb's arguments without a flag.
_POSITIONAL = {"config": ["$configs"], "name": ["$configs"], "settings": ["$settings"]}
_NO_FILES = dict.fromkeys(("config", "completion"), " files=''")


@verb(argument("shell", choices=("bash", "zsh"), help="zsh: by its bashcompinit"))
def _completion(shell: str) -> int:
    """Print a script that completes verbs, options, settings and their values in a shell: in
    ~/.bashrc, eval "$(neftune-dist completion bash)"."""
    setup = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    print(setup + _script())
    return outcome.EXIT_DONE


def _script() -> str:
    keys = [key for key in KNOBS if "[]" not in key]
    values = {key: KNOBS[key].words for key in keys if KNOBS[key].words}
    flags = {"--help"}
    words = {name: ["--help"] for name in VERBS}
    words["config"] += [*dict.fromkeys(key.partition(".")[0] for key in keys), *keys[1:]]
    for verb_name, (_, arguments) in VERBS.items():
        for (name, *_), options in arguments:
            choices = [str(value) for value in options.get("choices", ())]
            if not name.startswith("-"):
                words[verb_name] += _POSITIONAL.get(name, choices)
                continue
            words[verb_name].append(name)
            flags |= {name} if options.get("action") == "store_true" else set()
            values |= {name: choices} if choices else {}
    return _SCRIPT.format(
        configs="\n".join(shipped_configs()),
        settings="\n".join(f"{key}=" for key in keys),
        values="\n".join(f"    {n}) files='' {_assigned(v)} ;;" for n, v in values.items()),
        flags="|".join(sorted(flags)),
        verbs="\n".join(VERBS),
        verb_words="\n".join(
            f"      *-{n}) {_assigned(v)}{_NO_FILES.get(n, '')} ;;" for n, v in words.items()
        ),
    )


def _assigned(words: list[str]) -> str:
    return 'words="' + "\n".join(words) + '"'
