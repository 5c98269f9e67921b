#!/bin/sh
# A Chromium for the test of the chat page. Under CI it must be there; elsewhere that one test is skipped without it.
have() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
have >/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "== Installing Chromium for the test of the chat page (apt-get install chromium)"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } >/dev/null
fi
have >/dev/null && exit 0
if [ -n "$CI" ]; then echo "no Chromium, and CI skips nothing: apt-get install chromium" >&2; exit 1; fi
echo "== No Chromium here, so the test of the chat page will be skipped. To run it: sudo apt-get install chromium"
