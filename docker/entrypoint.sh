#!/bin/sh
# Turns a container's environment into a proper start of the server, and becomes it.
#
#   entrypoint.sh [FLAG...]      the server, with these flags of `loraplex serve`
#   entrypoint.sh healthcheck    0 if the server of this container can answer
#   entrypoint.sh COMMAND...     that command instead, such as `loraplex adapters check FOLDER`
#
# Beside the server's own settings:
#   LORAPLEX_API_KEY_FILE, LORAPLEX_REGISTRY_URL_FILE   files that hold the value, such as mounted secrets
set -eu

say() { printf 'entrypoint: %s\n' "$*" >&2; }
fail() { say "$*"; exit 78; } # EX_CONFIG of sysexits.h

# Puts the content of the file named by $1_FILE into $1. The server refuses variables it does not
# know, so that one goes.
take_file() {
    eval "file=\${$1_FILE:-}"
    unset "$1_FILE"
    [ -n "$file" ] || return 0
    [ -r "$file" ] || fail "cannot read $file, which $1_FILE names: is the secret mounted, for user $(id -u)?"
    value=$(cat "$file")
    [ -n "$value" ] || fail "$file, which $1_FILE names, is empty"
    export "$1=$value"
}

# Says which configuration file the flags or the environment name.
config_file() {
    found=${LORAPLEX_CONFIG:-}
    previous=
    for word; do
        case $previous:$word in
            --config:*) found=$word ;;
            *:--config=*) found=${word#--config=} ;;
        esac
        previous=$word
    done
    printf '%s' "$found"
}

# Whether somebody has said who may use the server, or that anybody may.
is_decided() {
    [ -z "${LORAPLEX_API_KEY:-}${LORAPLEX_ALLOW_OPEN:-}" ] || return 0
    for word; do
        case $word in
            --allow-open | --allow-open=*) return 0 ;;
        esac
    done
    file=$(config_file "$@")
    [ -n "$file" ] && grep -Eq '^[[:space:]]*(api_key|allow_open)[[:space:]]*=' "$file" 2>/dev/null
}

# A server that others reach needs a key; the first start makes one, and later ones find it.
provide_key() {
    case ${LORAPLEX_HOST:-127.0.0.1} in
        127.* | ::1 | localhost) return 0 ;;
    esac
    is_decided "$@" && return 0
    key_file=$data/admin-key
    if [ ! -s "$key_file" ]; then
        # Written beside and moved: a start that is cut short leaves no half key.
        (umask 077 && python -c 'import secrets; print("lp-" + secrets.token_urlsafe(32))' >"$key_file.new")
        mv "$key_file.new" "$key_file"
        say "no key was given, so this start made one: it is in $key_file (read it: cat $key_file)"
    else
        say "no key was given: using the one in $key_file"
    fi
    LORAPLEX_API_KEY=$(cat "$key_file")
    export LORAPLEX_API_KEY
}

case ${1:-} in
    healthcheck)
        exec python -c 'import sys, urllib.request
urllib.request.urlopen("http://127.0.0.1:" + sys.argv[1] + "/health", timeout=4)' "${LORAPLEX_PORT:-8000}"
        ;;
    "" | -*) ;;
    *) exec "$@" ;;
esac

# A service named "loraplex" makes Kubernetes set LORAPLEX_PORT to a URL, which is no port of ours.
case ${LORAPLEX_PORT:-} in
    *://*) unset LORAPLEX_PORT ;;
esac

data=${LORAPLEX_DATA_DIR:?set LORAPLEX_DATA_DIR to the folder that keeps adapters}
mkdir -p "$data" 2>/dev/null || fail "cannot make the data folder $data: mount a volume there"
if ! (: >"$data/.writable") 2>/dev/null; then
    fail "the data folder $data is not writable for user $(id -u), group $(id -g): chown it on the host, or set fsGroup"
fi
rm -f "$data/.writable"

# Kernels are compiled for the machine at the first start and kept with the data: the root file
# system may be read-only.
export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$data/cache}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$XDG_CACHE_HOME/triton}"
mkdir -p "$XDG_CACHE_HOME"

take_file LORAPLEX_API_KEY
take_file LORAPLEX_REGISTRY_URL
provide_key "$@"

# In its place, so that it is process 1 and gets the signals itself.
exec python -m loraplex_server "$@"
