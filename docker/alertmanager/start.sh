#!/bin/sh
# usage: start.sh [ALERTMANAGER'S OPTIONS]
# Start Alertmanager with the alertmanager.yml beside this file, and the webhook that VLAFLEET_ALERT_WEBHOOK names.
# Alertmanager reads no environment, and a webhook's address is often a secret: it goes into a file of this user's alone.
set -eu

here=$(dirname "$0")
config=${TMPDIR:-/tmp}/alertmanager.yml
webhook=${VLAFLEET_ALERT_WEBHOOK:-}

umask 077
rm -f "$config"
cat "$here/alertmanager.yml" >"$config"
case $webhook in
  "") echo "start: no VLAFLEET_ALERT_WEBHOOK: alerts show in Alertmanager, and nobody is told of them" >&2 ;;
  # What could end the quotes below, or the line. The address itself is not repeated: a log is no place for a secret.
  *[\'[:space:]]*) echo "start: VLAFLEET_ALERT_WEBHOOK holds a quote or a space: write it as %27 or %20" >&2; exit 17 ;;
  http://?* | https://?*)
    printf "    webhook_configs:\n      - url: '%s'\n        send_resolved: true\n" "$webhook" >>"$config"
    echo "start: alerts go to the address in VLAFLEET_ALERT_WEBHOOK" >&2
    ;;
  *) echo "start: VLAFLEET_ALERT_WEBHOOK is no web address: it begins with http:// or https://" >&2; exit 17 ;;
esac
unset VLAFLEET_ALERT_WEBHOOK webhook

# No cluster: one Alertmanager is told everything by one Prometheus.
[ $# -gt 0 ] || set -- --storage.path=/alertmanager --cluster.listen-address=
exec alertmanager --config.file="$config" "$@"
