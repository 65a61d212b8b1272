#!/bin/sh
# Installs what the build, the suites and the demo need and this machine lacks; with the word `bench`, what comparisons
# need, too. Debian 12 (or newer, or Ubuntu).
# Nothing is installed twice; what is there already, from wherever it came, is used.
set -eu

missing=""
# need PACKAGE TEST...: the package is wanted unless the test succeeds.
need() {
	package=$1
	shift
	"$@" >/dev/null 2>&1 || missing="$missing $package"
}
program() { command -v "$1"; }
compiler() { program clang-14 || program clang; }
header() { for file in /usr/include/"$1" /usr/include/*-linux-gnu/"$1"; do [ -e "$file" ] && return; done; return 1; }

need gcc program cc
need libc6-dev header stdlib.h
need make program make
need ca-certificates test -e /etc/ssl/certs/ca-certificates.crt
need clang-14 compiler
need libbpf-dev header bpf/bpf_helpers.h
need linux-libc-dev header asm/types.h
need iproute2 program ip
need ethtool program ethtool
need procps program sysctl
need nginx-light program nginx
need curl program curl
need iperf3 program iperf3
need python3 program python3
if [ "${1:-}" = bench ]; then
	need haproxy program haproxy
	need nftables program nft
	need valgrind program valgrind
	# valgrind wants to know the C library.
	need libc6-dbg test -d /usr/lib/debug/.build-id
	need util-linux program chrt
fi

if [ -n "$missing" ]; then
	if [ "$(id -u)" != 0 ]; then
		echo "missing:$missing — run this as root, or: apt-get install$missing" >&2
		exit 1
	fi
	if ! command -v apt-get >/dev/null; then
		echo "missing:$missing — there is no apt-get here: install what these packages hold" >&2
		exit 1
	fi
	echo "installing:$missing"
	export DEBIAN_FRONTEND=noninteractive
	# The packages of nginx and HAProxy start a server. We want the program only: nothing that a package starts may
	# start.
	policy=/usr/sbin/policy-rc.d
	if [ ! -e "$policy" ]; then
		trap 'rm -f "$policy"' EXIT
		trap 'exit 130' INT TERM
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 755 "$policy"
	fi
	apt-get update -qq
	case "$missing" in
	*clang-14*) apt-cache show clang-14 >/dev/null 2>&1 || missing=$(echo "$missing" | sed 's/clang-14/clang/') ;;
	esac
	# shellcheck disable=SC2086 # a list of packages
	apt-get install -y -qq --no-install-recommends $missing >/dev/null
	case "$missing" in
	# Nor at the next start of this machine: what `systemctl disable nginx` does, with or without systemd.
	*nginx*) rm -f /etc/systemd/system/multi-user.target.wants/nginx.service ;;
	esac
	case "$missing" in
	*haproxy*) rm -f /etc/systemd/system/multi-user.target.wants/haproxy.service ;;
	esac
fi

if ! command -v "${CARGO:-cargo}" >/dev/null; then
	echo "there is no cargo: install a Rust toolchain first (the oldest that will do stands in Cargo.toml)" >&2
	exit 1
fi
