#!/usr/bin/env bash
# Makes what the compose tests need and says where it is, as lines NAME=VALUE: podman with a configuration and a storage
# of its own, Docker Compose, and the image built on a base image.
#
# No registry of images is needed: the base is a minimal Debian from its packages, unless BASE names an image.
# Packages that are missing are installed where that is possible; else one line says which.
set -euo pipefail
cd "$(dirname "$0")/../.."

say() { echo "test-compose: $*" >&2; }

work=$PWD/build/test-compose     # kept: the second run begins with what the first one made
run=/run/perch-test-compose      # sockets; their paths must be short
[ "$(id -u)" = 0 ] || { say "needs root: podman's networks and debootstrap do"; exit 2; }
mkdir -p "$work" "$run"

# --- Debian's packages

declare -A owner=(
    [podman]=podman [runc]=runc [debootstrap]=debootstrap [iptables]=iptables
    [/usr/lib/podman/netavark]=netavark [/usr/lib/podman/aardvark-dns]=aardvark-dns
)
missing=()
for program in "${!owner[@]}"; do
    command -v "$program" >/dev/null || missing+=("${owner[$program]}")
done
if [ "${#missing[@]}" -gt 0 ]; then
    command -v apt-get >/dev/null || { say "missing, and there is no apt-get to install it: ${missing[*]}"; exit 2; }
    say "installing ${missing[*]}"
    { apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$work/apt.log" 2>&1 ||
        { say "missing, and apt-get could not install it (see $work/apt.log): ${missing[*]}"; exit 2; }
fi

# Programs taken out of Debian's packages, whatever release this machine runs, and not installed: Docker Compose itself,
# which reads the files and talks to podman, and Prometheus with promtool, which the package of trixie has not.
compose=$work/docker-compose prometheus=$work/prometheus
if [ ! -x "$prometheus/prometheus" ] || [ ! -x "$compose" ]; then
    say "fetching Docker Compose and Prometheus from Debian"
    apt=$work/apt
    mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial" "$prometheus"
    for release in trixie bookworm; do
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $release main"
    done >"$apt/sources.list"
    options=(-o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$apt/lists"
        -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root)
    (cd "$apt" && apt-get "${options[@]}" update -qq &&
        apt-get "${options[@]}" download -qq docker-compose/trixie prometheus/bookworm) >>"$work/apt.log" 2>&1 ||
        { say "missing, and apt-get could not fetch it (see $work/apt.log): docker-compose prometheus"; exit 2; }
    dpkg-deb --fsys-tarfile "$apt"/docker-compose_*.deb | tar -xO ./usr/libexec/docker/cli-plugins/docker-compose >"$compose"
    dpkg-deb --fsys-tarfile "$apt"/prometheus_*.deb |
        tar -xC "$prometheus" --strip-components=3 ./usr/bin/promtool ./usr/bin/prometheus
    chmod 755 "$compose"
    rm -rf "$apt"
fi

# --- an engine of its own: no image, network or setting of this machine's podman is touched

cat >"$work/containers.conf" <<END
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "$run/libpod"
[network]
network_backend = "netavark"
network_config_dir = "$work/networks"
END
cat >"$work/storage.conf" <<END
[storage]
driver = "overlay"
graphroot = "$work/storage"
runroot = "$run/storage"
END
export CONTAINERS_CONF=$work/containers.conf CONTAINERS_STORAGE_CONF=$work/storage.conf

# --- the images

if [ -z "${BASE:-}" ]; then
    BASE=localhost/perch-test-base:trixie
    if ! podman image exists "$BASE"; then
        say "making the base image: a minimal Debian trixie with Python"
        root=$work/root
        rm -rf "$root"
        debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates trixie "$root" \
            http://deb.debian.org/debian >"$work/debootstrap.log" 2>&1 || { say "debootstrap failed: see $work/debootstrap.log"; exit 1; }
        rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}/*
        tar -C "$root" -c . | podman import --quiet - "$BASE" >/dev/null
        rm -rf "$root"
    fi
fi
say "building the image on $BASE"
# pip is given the certificates of this machine, whose network may have one of its own.
certificates=/etc/ssl/certs/ca-certificates.crt
mounts=()
[ ! -f "$certificates" ] || mounts=(-v "$certificates:$certificates:ro")
image=localhost/perch-test:latest
podman build --network host "${mounts[@]}" --build-arg "BASE=$BASE" -f compose/Dockerfile -t "$image" . >"$work/build.log" 2>&1 ||
    { tail -20 "$work/build.log" >&2; say "the image cannot be built: see $work/build.log"; exit 1; }
# Stand-ins for the overlay's images: Prometheus itself, from its package, and something that takes StatsD lines.
podman build --network none -f - -t localhost/perch-test-prometheus:latest "$prometheus" >"$work/build.log" 2>&1 <<END
FROM $BASE
COPY prometheus /bin/prometheus
RUN install -d -o 65534 -g 65534 /prometheus
ENTRYPOINT ["/bin/prometheus"]
END
podman build --network none -f - -t localhost/perch-test-statsd:latest compose/tests >"$work/build.log" 2>&1 <<END
FROM $image
COPY statsd_stand_in.py /statsd_stand_in.py
ENTRYPOINT ["python", "/statsd_stand_in.py"]
END
podman image prune --force --filter until=24h >/dev/null  # layers of earlier builds are a cache, for a day

echo "CONTAINERS_CONF=$CONTAINERS_CONF"
echo "CONTAINERS_STORAGE_CONF=$CONTAINERS_STORAGE_CONF"
echo "COMPOSE=$compose"
echo "IMAGE=$image"
echo "PROMETHEUS_IMAGE=localhost/perch-test-prometheus:latest"
echo "STATSD_IMAGE=localhost/perch-test-statsd:latest"
echo "PROMTOOL=$prometheus/promtool"
echo "RUN=$run"
echo "STORAGE=$work/storage/overlay"
