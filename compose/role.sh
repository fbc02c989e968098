#!/bin/sh
# The role of a container, by its command: serve | control | model DIR ... | envoy. Whatever else it is, is run as it is.
# exec: the role is process 1 and gets the engine's SIGTERM itself.
set -eu
case "${1:-}" in
    serve | control) exec perch "$@" ;;
    model)
        shift
        [ -z "${PERCH_STATSD:-}" ] || set -- "$@" --statsd "$PERCH_STATSD" --statsd-tags "${PERCH_STATSD_TAGS:-dogstatsd}"
        exec python -m model_servers "$@"
        ;;
    envoy) exec perch envoy run ;;
    *) exec "$@" ;;
esac
