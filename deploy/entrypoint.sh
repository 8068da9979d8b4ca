#!/bin/sh
# The entry point of a container: run a program of the image, or else a command of hm with its arguments.
if command -v "${1:-}" > /dev/null 2>&1; then exec "$@"; fi
exec hm "$@"
