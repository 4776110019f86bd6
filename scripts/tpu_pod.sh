#!/usr/bin/env bash
#
# Fine-tunes on a Cloud TPU slice of one or many hosts, with gcloud.
#
#   tpu_pod.sh COMMAND --name NAME --zone ZONE [FLAG...] [-- FLAGS OF `loft-jax finetune`]
#
#   tpu_pod.sh run --name tuning --zone us-west4-a --type v5litepod-16 \
#       --version v2-alpha-tpuv5-lite --spot --setup "$MOUNT" \
#       -- --model /mnt/shared/llama --data.path /mnt/shared/rows.jsonl --output /mnt/shared/first
#
# Every host reads the data and reads and writes its part of the checkpoints: model, data and
# --output must be on a place that all hosts share, a mounted bucket or NFS (Filestore). --setup
# mounts it on each new host; it may run again on a host where it is mounted:
#
#   MOUNT='sudo mkdir -p /mnt/shared && sudo chown "$USER" /mnt/shared && { mountpoint -q /mnt/shared
#     || gcsfuse --implicit-dirs --rename-dir-limit 100000 BUCKET /mnt/shared; }'    (in one line)
#
# Orbax completes a checkpoint by renaming its folder, which gcsfuse refuses without that limit,
# unless the bucket has a hierarchical namespace. Nothing tells the processes of each other: on
# Cloud TPU, jax.distributed.initialize() asks the metadata server.
#
# Commands:
#   up        create the slice and wait for it; one that is READY is used, one that was preempted
#             is deleted and created again
#   install   run --setup, then install loft-jax, on all hosts
#   launch    start the run on all hosts; it outlives the connection. One run at a time
#   resume    as launch, with --resume
#   logs      follow the run on a host until it ends; exits with the run's status
#   status    show the slice, and the run on each host
#   stop      have the run save a checkpoint and end, and wait for that
#   down      delete the slice
#   run       up, install, launch, logs; whenever the slice is lost, once more, with --resume. Given
#             again while its run is going, it follows that
#
# Flags, of which each command takes what it needs:
#   --name NAME            of the slice; --zone ZONE; --project PROJECT (default: gcloud's)
#   --type TYPE            accelerator type: v5litepod-16 (for up, run)
#   --version VERSION      runtime version: v2-alpha-tpuv5-lite (for up, run)
#   --spot                 cheaper, and may be preempted; default: on demand
#   --queued               wait in line as a queued resource, of the same name (for up, run, down)
#   --create-arg=ARG       one more argument for gcloud's create: --create-arg=--network=NET. Repeat
#   --connect-arg=ARG      one more argument for gcloud's ssh and scp: --connect-arg=--internal-ip
#   --alpha                use `gcloud alpha`, which has --connect-arg=--tunnel-through-iap
#   --source DIR           git checkout to install (default: this one); its tracked files are sent
#   --repo URL             install from a git repository that the hosts can reach instead
#   --ref REF              branch, tag or commit (default: the checkout as it is, edits included;
#                          for --repo, its default branch)
#   --extras LIST          of loft-jax (default: tpu)
#   --setup COMMAND        shell command for install to run first on all hosts
#   --worker N             host that logs and run follow (default: 0)
#   --max-restarts N       how often run goes on with a lost slice (default: 20)
#   --stop-timeout SECONDS for a stopped run to save and end (default: 900)
#   --poll SECONDS         between questions to gcloud (default: 15)
#   --dry-run              print the commands, a line each, and run none: as for a new slice
#
# Several hosts need the key in ssh-agent: ssh-add ~/.ssh/google_compute_engine. Tokens are best
# written by --setup to ~/loft-jax/env on the hosts (lines NAME=VALUE, as HF_TOKEN), which the run
# reads; nothing of the kind is sent from here.
#
# Exit status: 0; 2 for a wrong command line; 3 if another run is going; for logs and run, that of
# the run (130: stopped, a checkpoint is saved); 1 for all else.

set -euo pipefail
exec 3>&1 # what --dry-run prints, also from inside of $(...)

readonly CONNECT_TRIES=3
readonly SETTLE_POLLS=4
readonly STATES_TO_WAIT=' CREATING STARTING RESTARTING REIMAGING REPAIRING STOPPING DELETING '
readonly QUEUE_STATES_TO_WAIT=' CREATING ACCEPTED WAITING_FOR_RESOURCES PROVISIONING ACTIVE DELETING
  SUSPENDING '

# Settings; the flags of the same names.
command='' name='' zone='' project='' type='' version='' source='' repo='' ref='' setup=''
extras=tpu worker=0 max_restarts=20 stop_timeout=900 poll=15
spot=false queued=false alpha=false dry_run=false
create_args=() connect_args=() run_args=()

say() { printf 'tpu_pod: %s\n' "$*" >&2; }

die() { say "$*" && exit 1; }

refuse() { say "$*; see tpu_pod.sh --help" && exit 2; }

usage() { sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

# --- the command line ---

parse() {
  local flag value inline
  while (($#)); do
    flag=$1 value='' inline=false
    if [[ $flag == --*=* ]]; then
      value=${flag#*=} flag=${flag%%=*} inline=true
    fi
    case $flag in
      --) shift && run_args=("$@") && break ;;
      -h | --help) usage && exit 0 ;;
      --spot | --queued | --alpha | --dry-run)
        [[ $inline == false ]] || refuse "$flag takes no value"
        flag=${flag#--}
        printf -v "${flag//-/_}" true
        ;;
      --name | --zone | --project | --type | --version | --source | --repo | --ref | --extras | \
        --setup | --worker | --max-restarts | --stop-timeout | --poll | --create-arg | --connect-arg)
        if [[ $inline == false ]]; then
          [[ $# -gt 1 && $2 != --* ]] || refuse "$flag: its value is missing ($flag=VALUE)"
          value=$2
          shift
        fi
        [[ $value ]] || refuse "$flag: its value is empty"
        case $flag in
          --create-arg) create_args+=("$value") ;;
          --connect-arg) connect_args+=("$value") ;;
          *) flag=${flag#--} && printf -v "${flag//-/_}" %s "$value" ;;
        esac
        ;;
      -*) refuse "unknown flag $flag" ;;
      *)
        [[ -z $command ]] || refuse "$flag is one word too many behind $command"
        command=$flag
        ;;
    esac
    shift
  done
}

check() {
  local flag
  case $command in
    up | install | launch | resume | logs | status | stop | down | run) ;;
    '') refuse 'no command is given' ;;
    *) refuse "unknown command $command" ;;
  esac
  for flag in name zone; do
    [[ ${!flag} ]] || refuse "--$flag is missing"
  done
  [[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    refuse "--name is $name, expected small letters, digits and hyphens"
  if [[ $command == up || $command == run ]]; then
    for flag in type version; do
      [[ ${!flag} ]] || refuse "--$flag is missing"
    done
  fi
  for flag in worker max_restarts stop_timeout; do
    [[ ${!flag} =~ ^[0-9]+$ ]] || refuse "--${flag//_/-} is ${!flag}, expected a whole number"
  done
  [[ $poll =~ ^[0-9]+(\.[0-9]+)?$ ]] || refuse "--poll is $poll, expected seconds"
  [[ -z $source || -z $repo ]] || refuse '--source and --repo are given, expected one at most'
  [[ $ref != -* ]] || refuse "--ref is $ref, expected a branch, tag or commit"
  case $command in
    launch | resume | run)
      ((${#run_args[@]})) || refuse 'the flags of loft-jax finetune are missing, behind --'
      ;;
    *) ((!${#run_args[@]})) || refuse "$command takes nothing behind --" ;;
  esac
}

# --- running commands, or printing them ---

# Words as a shell reads them. Not `printf %q` alone: its backslashes are hard to read, and are
# only needed for control characters, which would break the line.
quote() {
  local word single="'" escaped="'\\''" out=()
  for word; do
    case $word in
      *[[:cntrl:]]*) printf -v word %q "$word" ;;
      '' | *[!A-Za-z0-9_./:=@%+,-]*) word=\'${word//$single/"$escaped"}\' ;;
    esac
    out+=("$word")
  done
  printf '%s' "${out[*]}"
}

execute() {
  if [[ $dry_run == true ]]; then
    printf '%s\n' "$(quote "$@")" >&3
  else
    "$@"
  fi
}

pause() { [[ $dry_run == true ]] || sleep "$poll"; }

tpus() { execute gcloud $([[ $alpha == false ]] || echo alpha) compute tpus "$@"; }

# Where the slice is, for each command of gcloud.
place() { where=(--zone="$zone" ${project:+--project="$project"}); }

# Runs a command in the shell of a host, or of all. gcloud runs it again by itself when a connection
# fails, and so does this: whatever is run this way must bear that.
remote() {
  local tries=0 code
  while true; do
    code=0
    remote_once "$@" || code=$?
    ((code == 255 && ++tries < CONNECT_TRIES)) || return "$code" # 255: ssh itself failed
    say "no connection to $name; trying again"
    pause
  done
}

remote_once() { # WORKER COMMAND
  # Without keepalive, the connection to a preempted host hangs.
  tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --quiet \
    --ssh-flag='-o ServerAliveInterval=15 -o ServerAliveCountMax=4' \
    ${connect_args[@]+"${connect_args[@]}"} --command="$2"
}

# --- the slice ---

# State of the node or of the queued resource; ABSENT if there is none.
describe() { # KIND FIELD
  local tries=0 state
  while true; do
    if state=$(tpus "$1" describe "$name" "${where[@]}" --format="value($2)" 2>"$work/error"); then
      if [[ $dry_run == true ]]; then
        state=$imagined
      fi
      printf '%s\n' "${state:-UNKNOWN}"
      return
    fi
    if grep -q NOT_FOUND "$work/error"; then
      echo ABSENT
      return
    fi
    if ((++tries == CONNECT_TRIES)); then
      cat "$work/error" >&2
      return 1
    fi
    pause
  done
}

slice_state() { describe tpu-vm state || die "cannot tell the state of $name"; }

queue_state() {
  describe queued-resources state.state || die "cannot tell the state of queued resource $name"
}

create() {
  local create=(tpu-vm create "$name" "${where[@]}" --accelerator-type="$type" --version="$version")
  if [[ $queued == true ]]; then
    create=(queued-resources create "$name" --node-id="$name" "${where[@]}"
      --accelerator-type="$type" --runtime-version="$version")
  fi
  if [[ $spot == true ]]; then
    create+=(--spot)
  fi
  create+=(${create_args[@]+"${create_args[@]}"} --quiet)
  say "creating $name ($type)"
  imagined=READY
  if ! tpus "${create[@]}" 2>&1 1>&3 | tee "$work/error" >&2; then
    grep -qi 'no more capacity' "$work/error" || die "cannot create $name"
    say "asking again every $poll s; --queued waits in line"
    pause
  fi
}

delete() {
  if [[ $queued == true ]]; then
    tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    tpus tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

# Deletes what a preemption left. The slice may have been made without --queued.
delete_lost() {
  say "$name is $1: deleting it"
  if [[ $queued == true && $(queue_state) == ABSENT ]]; then
    queued=false delete || die "cannot delete $name"
  else
    delete || die "cannot delete $name"
  fi
}

# Waits for a slice that is READY, and makes it if need be; `fresh` tells whether it did.
bring_up() {
  local state shown=''
  fresh=false
  while true; do
    state=$(slice_state)
    case $state in
      READY) break ;;
      PREEMPTED | TERMINATED) delete_lost "$state" && continue ;;
    esac
    if [[ $state == ABSENT && $queued == true ]]; then
      state=$(queue_state)
      case $state in
        SUSPENDED) delete_lost "$state" && continue ;;
        READY | ABSENT) ;;
        *) [[ $QUEUE_STATES_TO_WAIT == *" $state "* ]] || die "queued resource $name is $state" ;;
      esac
    elif [[ $state != ABSENT && $STATES_TO_WAIT != *" $state "* ]]; then
      die "$name is $state; start it with gcloud, or delete it (down)"
    fi
    if [[ $state == ABSENT ]]; then
      create
      fresh=true
      continue
    fi
    if [[ $state != "$shown" ]]; then
      say "$name is $state; waiting"
      shown=$state
    fi
    pause
  done
  say "$name is READY"
}

# Whether the slice went away; its state lags behind the end of its hosts.
slice_lost() {
  local i state
  for ((i = 0; i < SETTLE_POLLS; i++)); do
    ((i == 0)) || pause
    state=$(slice_state)
    [[ $state == READY ]] || return 0
  done
  return 1
}

# --- the run, on the hosts ---

# ~/loft-jax of each host holds venv, env and of the run: run.id, run.pid, run.log, run.status when
# it has ended, run.stopped when it was told to. In one line each, as --dry-run prints lines.
# shellcheck disable=SC2016  # expanded by the shell of the host
readonly PRELUDE='mkdir -p ~/loft-jax && cd ~/loft-jax || exit 1; '\
'going() { [ -s run.pid ] && grep -qs loft-jax "/proc/$(cat run.pid)/cmdline"; }; '
# A run whose host was restarted has left no status; one that just ended writes it at once.
# shellcheck disable=SC2016
readonly STATE='state() { if going; then echo running; elif [ -e run.id ]; then '\
'[ -s run.status ] || sleep 2; if [ -s run.status ]; then '\
'echo "ended $(cat run.status)$([ ! -e run.stopped ] || echo " stopped")"; '\
'else echo lost; fi; else echo none; fi; }; '
# shellcheck disable=SC2016
readonly REFUSE_GOING='if going; then echo "a run is going on $(hostname)" >&2; exit 3; fi; '

# Same for the same arguments, apart from --resume.
fingerprint() {
  local word words=()
  for word in "${run_args[@]}"; do
    [[ $word == --resume ]] || words+=("$word")
  done
  printf '%s\n' "${words[@]}" | cksum | cut -d' ' -f1
}

send_source() {
  local folder=$source commit=$ref archive
  if [[ -z $folder ]]; then
    folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  fi
  git -C "$folder" rev-parse --git-dir >/dev/null 2>&1 ||
    refuse "--source: $folder is no git checkout"
  if [[ -z $commit ]]; then # a commit of the edits that nothing else sees; empty without edits
    commit=$(execute git -C "$folder" stash create) || die "cannot read the edits in $folder"
  fi
  archive=$work/loft-jax-source.tar.gz
  execute git -C "$folder" archive --format=tar.gz --prefix=loft-jax/ -o "$archive" \
    "${commit:-HEAD}" || die "cannot pack $folder"
  say "sending $folder"
  local tries=0
  until tpus tpu-vm scp "$archive" "$name": "${where[@]}" --worker=all --quiet \
    ${connect_args[@]+"${connect_args[@]}"}; do
    ((++tries < CONNECT_TRIES)) || return 1
    pause
  done
}

install() {
  local requirement script code=0
  if [[ $fresh == false ]]; then # replacing the package under a run would break it
    remote all "$PRELUDE$REFUSE_GOING" || return
  fi
  if [[ $setup ]]; then
    say "running --setup on $name"
    remote all "$setup" || return
  fi
  # shellcheck disable=SC2016
  requirement="\"loft-jax[$extras] @ file://\$HOME/loft-jax-source.tar.gz\""
  if [[ $repo ]]; then
    requirement=$(quote "loft-jax[$extras] @ git+$repo${ref:+@$ref}")
  else
    send_source || return
  fi
  # Runtime images may have a Python that is too old, or no ensurepip; uv then brings one. pip does
  # not replace a package by another build of the same version, hence uninstall.
  # shellcheck disable=SC2016
  script='set -e; if [ ! -x venv/bin/pip ]; then rm -rf venv; '\
'for python in python3.13 python3.12 python3.11 python3; do '\
'if "$python" -c "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; '\
'then "$python" -m venv venv; break; fi; done; fi; '\
'if [ ! -x venv/bin/pip ]; then '\
'curl -LsSf https://astral.sh/uv/install.sh | env UV_UNMANAGED_INSTALL="$PWD/uv" sh; '\
'uv/uv venv --seed --python 3.12 venv; fi; '\
'venv/bin/pip uninstall -q -y loft-jax; venv/bin/pip install -q '
  say "installing on $name"
  remote all "$PRELUDE$script$requirement" || code=$?
  return "$code"
}

# Folder that the run writes to, if its flags tell.
output_folder() {
  local word before='' found=''
  for word in "${run_args[@]}"; do
    case $before in --output) found=$word ;; esac
    case $word in --output=*) found=${word#*=} ;; esac
    before=$word
  done
  printf '%s' "$found"
}

# Starts the run on all hosts. setsid and nohup are on every image and need no session of the user:
# tmux may be missing, and systemd-run --user ends with the last login unless lingering is on.
# MODE: launch; resume; or auto, which resumes unless the run was lost before it wrote anything.
start() {
  local mode=$1 id script args=(finetune "${run_args[@]}") output resumed=false word
  for word in "${run_args[@]}"; do
    [[ $word != --resume ]] || resumed=true
  done
  output=$(output_folder)
  if [[ $mode == auto && -z $output ]]; then
    mode=resume
  fi
  if [[ $mode == resume && $resumed == false ]]; then
    args+=(--resume)
  fi
  # Asked first on all hosts: a run on one of them must not be met half-way.
  remote all "$PRELUDE$REFUSE_GOING" || return
  id=$(fingerprint)-$(date +%s)-$$
  # The id tells a host that this very start was there before, when a connection fails behind it.
  script="if [ \"\$(cat run.id 2>/dev/null)\" = $id ]; then exit 0; fi; $REFUSE_GOING"
  script+="set -- $(quote "${args[@]}"); "
  if [[ $mode == auto && $resumed == false ]]; then
    script+="if [ -e $(quote "$output/config.yaml") ]; then set -- \"\$@\" --resume; fi; "
  fi
  # shellcheck disable=SC2016
  script+='rm -f run.pid run.status run.stopped; '\
'if [ -e run.log ]; then mv run.log run.log.old; fi; '\
'if [ -e env ]; then set -a; . ./env; set +a; fi; '"echo $id > run.id; "\
'setsid nohup bash -c '\''venv/bin/loft-jax "$@" & echo $! > run.pid; '\
'wait $!; echo $? > run.status'\'' loft-jax "$@" > run.log 2>&1 < /dev/null & '\
'until [ -s run.pid ]; do sleep 0.1; done'
  say "starting loft-jax finetune on $name"
  remote all "$PRELUDE$script"
}

# What the run on a host does, as `found` (running, ended, lost, none), `status`, `stopped`, `id`.
ask_run() { # WORKER
  local line
  # shellcheck disable=SC2016
  line=$(remote "$1" "$PRELUDE$STATE"'echo "$(cat run.id 2>/dev/null || echo -) $(state)"') || return
  if [[ $dry_run == true ]]; then
    line='- ended 0'
  fi
  read -r id found status stopped <<<"${line##*$'\n'}"
}

# Shows the log of a host until the run has ended, across lost connections.
follow() { # WORKER
  local code script again=0
  : >"$work/log"
  while true; do
    # From the byte behind those that were shown. --pid: until that process has ended.
    # shellcheck disable=SC2016
    script='if going; then exec tail -f -c +FROM --pid="$(cat run.pid)" run.log; fi; '\
'if [ -e run.log ]; then exec tail -c +FROM run.log; fi'
    script=${script//FROM/$(($(wc -c <"$work/log") + 1))}
    code=0
    remote_once "$1" "$PRELUDE$script" | tee -a "$work/log" || code=$?
    ask_run "$1" || return
    if [[ $found != running ]] && ((code == 0 || ++again == CONNECT_TRIES)); then
      return
    fi
    pause
  done
}

# Waits until the run has ended on all hosts; those of a lost run take a while to notice.
await_end() {
  # shellcheck disable=SC2016
  remote all "${PRELUDE}n=0; while going; do [ \$n -lt $stop_timeout ] || exit 4; "\
'sleep 1; n=$((n + 1)); done'
}

# --- commands ---

up() { bring_up; }

launch() { start launch || exit; }

resume() { start resume || exit; }

logs() {
  ((dry_run_says_nothing)) || trap 'say "the run goes on"; exit 130' INT
  follow "$worker" || die "cannot reach host $worker of $name"
  case $found in
    ended)
      say "the run has ended with status $status"
      exit "$status"
      ;;
    lost) die 'the run was killed, or its host restarted; resume goes on' ;;
    *) die "nothing was launched on $name" ;;
  esac
}

status() {
  local state
  state=$(slice_state)
  [[ $dry_run == true ]] || echo "$name: $state"
  if [[ $state == READY || $dry_run == true ]]; then
    # shellcheck disable=SC2016
    remote all "$PRELUDE$STATE"'echo "$(hostname): $(state)"'
  fi
}

stop() {
  # A second signal would end the run without a checkpoint, hence the mark. Told to all first: the
  # hosts save together.
  # shellcheck disable=SC2016
  remote all "$PRELUDE"'if going && [ ! -e run.stopped ]; then touch run.stopped; '\
'kill -TERM "$(cat run.pid)"; fi' || exit
  say "waiting for the run on $name to save a checkpoint"
  await_end || die "the run on $name has not ended within $stop_timeout s"
}

down() { delete; }

# One stretch of a run, until it has ended or its slice is lost: `outcome` is then empty.
stretch() { # MODE
  outcome=''
  bring_up
  if [[ $fresh == false ]]; then
    if ! ask_run "$worker"; then
      slice_lost || die "cannot reach host $worker of $name"
      return
    fi
    if [[ $found == running && ${id%%-*} == "$(fingerprint)" ]]; then
      say 'this run is going already'
    elif [[ $found == running && $1 == launch ]]; then
      say "another run is going on $name"
      exit 3
    else
      found=''
    fi
  fi
  if [[ $fresh == true || -z $found ]]; then
    [[ $1 == launch ]] || await_end || slice_lost || die "the run on $name has not ended everywhere"
    local code=0
    { install && start "$1"; } || code=$?
    if ((code)); then
      ((code != 3)) || exit 3
      slice_lost || die "cannot start on $name"
      return
    fi
  fi
  mode=auto
  if ! follow "$worker"; then
    slice_lost || die "cannot reach host $worker of $name; give run again to follow the run"
    return
  fi
  [[ $found == ended ]] || return 0
  # 130 and 143 without `stop`: the host is shutting down. 2 is wrong input, whatever the slice does.
  # shellcheck disable=SC2154  # set by ask_run
  case $status:$stopped in
    0: | 2: | *:stopped) outcome=$status ;;
    130: | 143:) ;;
    *) slice_lost || outcome=$status ;;
  esac
}

run() {
  local restarts=0
  mode=launch
  trap 'say "the run goes on; stop ends it, run follows it again"; exit 130' INT
  while true; do
    stretch "$mode"
    [[ -z $outcome ]] || break
    ((++restarts <= max_restarts)) || die "$name was lost $restarts times; --max-restarts allows no more"
    say "$name was lost; going on ($restarts of $max_restarts)"
    pause
  done
  say "the run has ended with status $outcome; $name is still there (down deletes it)"
  exit "$outcome"
}

parse "$@"
check
