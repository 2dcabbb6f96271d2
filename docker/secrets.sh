#!/bin/sh
# Make the secrets of compose.yaml once: a key for clients, one for Prometheus, Grafana's password.
# Those that are there stay. The files can be read by every user id, since containers have their
# own; the folder can be opened by you alone.
set -eu
cd "$(dirname "$0")"
mkdir -p secrets
chmod 700 secrets
key() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
[ -s secrets/metrics_key ] || key > secrets/metrics_key
[ -s secrets/grafana_password ] || key > secrets/grafana_password
[ -s secrets/api_keys ] || printf '%s\n%s\n' "$(key)" "$(cat secrets/metrics_key)" > secrets/api_keys
chmod 644 secrets/*
echo "clients: $(pwd)/secrets/api_keys, first line; Grafana (admin): $(pwd)/secrets/grafana_password"
