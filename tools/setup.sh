# Shared by tools/quickstart and tools/test, which source it: finds Rust and installs what is
# missing. It never downloads and runs a script, and it says what it is about to run as root.
# shellcheck shell=sh

# Administrators' tools are not in the PATH of a plain Debian user.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin:${HOME:-/nonexistent}/.cargo/bin
export PATH

INSTALL=yes
# Set once apt-get has been asked for the lists.
APT_UPDATED=no

say() { printf '%s\n' "$*"; }
warn() { printf '%s\n' "$*" >&2; }
die() {
	printf '%s: %s\n' "${0##*/}" "$1" >&2
	shift
	for line; do printf '  %s\n' "$line" >&2; done
	exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }
is_root() { [ "$(id -u)" -eq 0 ]; }

# The value of a field of /etc/os-release, without quotes.
os_release() {
	[ -r /etc/os-release ] || return 0
	sed -n "s/^$1=//p" /etc/os-release | tr -d "\"'" | head -n 1
}

# How this distribution gets Rust 1.85 or newer.
rust_advice() {
	case "$(os_release ID):$(os_release VERSION_ID)" in
	debian:12) say "apt install cargo-web      (Debian 12's package of a recent Rust)" ;;
	debian:*) say "apt install cargo          (Debian 13 and newer)" ;;
	ubuntu:*) say "apt install rustup && rustup default stable" ;;
	fedora:*) say "dnf install cargo" ;;
	arch:*) say "pacman -S rust" ;;
	opensuse*) say "zypper install cargo" ;;
	alpine:*) say "apk add cargo" ;;
	*) say "your distribution's package of Rust 1.85 or newer, or https://rustup.rs" ;;
	esac
}

# Fails with advice unless cargo, rustc >= 1.85 and a linker are there.
need_rust() {
	need_packages 'cc:gcc libc6-dev'
	if ! have cargo || ! have rustc; then
		die "Rust is not installed (1.85 or newer is needed)." "fix: $(rust_advice)"
	fi
	rust_version=$(rustc --version 2>/dev/null | awk '{ print $2 }')
	rust_minor=$(printf '%s' "$rust_version" | awk -F. '{ print $1 * 1000 + $2 }')
	if [ "${rust_minor:-0}" -lt 1085 ]; then
		die "rustc is ${rust_version:-of an unknown version}; 1.85 or newer is needed." \
			"fix: $(rust_advice)"
	fi
	have cc || die "there is no C compiler, which Rust needs for linking." "fix: install gcc"
}

# Runs a command as root: directly, or through sudo after saying so.
as_root() {
	if is_root; then
		"$@"
	elif have sudo; then
		warn "(needs root) sudo $*"
		# Without a terminal nobody can type the password.
		if [ -t 0 ]; then sudo "$@"; else sudo -n "$@"; fi
	else
		warn "needs root and there is no sudo: $*"
		return 1
	fi
}

apt() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -y -q --no-install-recommends "$@"; }

# Installs packages with apt-get; one that does not exist does not stop the others.
apt_install() {
	if [ "$APT_UPDATED" = no ]; then
		APT_UPDATED=yes
		apt update >/dev/null || warn "apt-get update failed; trying with the lists there are"
	fi
	# Unquoted on purpose: the argument is a list of names.
	# shellcheck disable=SC2086
	apt install $1 >/dev/null && return 0
	for package in $1; do
		apt install "$package" >/dev/null 2>&1 || warn "could not install $package"
	done
}

# need_packages 'command:package ...' ...: installs the packages of the commands that are missing.
# Never fails: the caller looks at what is there afterwards.
need_packages() {
	wanted=
	for pair; do
		have "${pair%%:*}" || wanted="$wanted ${pair#*:}"
	done
	wanted=${wanted# }
	[ -n "$wanted" ] || return 0
	if [ "$INSTALL" = no ]; then
		warn "missing packages: $wanted (not installed because of --no-install)"
	elif have apt-get; then
		say "installing: $wanted"
		apt_install "$wanted" || true
	else
		warn "missing; please install what your distribution calls: $wanted"
	fi
}

# Makes /dev/fuse where the module is only not loaded yet.
load_fuse() {
	if [ ! -e /dev/fuse ] && is_root && have modprobe; then
		modprobe fuse 2>/dev/null || true
	fi
}

# Prints why FUSE cannot be used here, or nothing.
fuse_obstacle() {
	if [ ! -e /dev/fuse ]; then
		printf 'there is no /dev/fuse (modprobe fuse; in a container: %s)\n' \
			'--device /dev/fuse --cap-add SYS_ADMIN'
	elif [ ! -r /dev/fuse ] || [ ! -w /dev/fuse ]; then
		user=$(id -un 2>/dev/null || id -u)
		say "/dev/fuse may not be opened by $user (its usual mode is 0666)"
	elif ! is_root && ! have fusermount3; then
		say "fusermount3 is missing (package fuse3), and only root mounts without it"
	fi
}

# Prints why loop devices cannot be used here, or nothing.
loop_obstacle() {
	if ! is_root; then
		say "loop devices need root"
	elif [ ! -e /dev/loop-control ]; then
		say "there is no /dev/loop-control (modprobe loop)"
	elif ! have losetup; then
		say "losetup is missing (package mount or util-linux)"
	fi
}
