#!/usr/bin/env bash
#
# Fine-tunes on a Cloud TPU slice of one or many hosts, with gcloud.
#
#   tpu_pod.sh COMMAND --name NAME --zone ZONE [FLAG...] [-- FLAGS OF loft-jax finetune]
#
#   tpu_pod.sh run --name tuning --zone us-west4-a --type v5litepod-16 \
#       --version v2-alpha-tpuv5-lite --spot --setup "$MOUNT" \
#       -- --model /mnt/shared/llama --data.path /mnt/shared/rows.jsonl --output /mnt/shared/first
#
# Every host reads the data and reads and writes its part of the checkpoints: model, data and
# --output must be on a place that all hosts share, a mounted bucket or NFS (Filestore). --setup
# mounts it on each new host; it must bear being run again:
#
#   MOUNT='sudo mkdir -p /mnt/shared && sudo chown "$USER" /mnt/shared &&
#     { mountpoint -q /mnt/shared ||
#       gcsfuse --implicit-dirs --rename-dir-limit 100000 BUCKET /mnt/shared; }'
#
# Orbax completes a checkpoint by renaming its folder, which gcsfuse refuses without that limit
# unless the bucket has a hierarchical namespace. Nothing tells the processes of each other: on
# Cloud TPU, jax.distributed.initialize() asks the metadata server.
#
# Commands:
#   up        create the slice and wait for it; one that is READY is used, one that was preempted
#             is deleted and created again
#   install   run --setup, then install loft-jax, on all hosts
#   launch    start the run on all hosts, one at a time; it outlives the connection
#   resume    as launch, with --resume
#   logs      follow the run on a host until it ends; exits with its status
#   status    show the slice, and the run on each host
#   stop      have the run save a checkpoint and end, and wait for that
#   down      delete the slice
#   run       up, install, launch, logs; when the slice is preempted or a host goes down, all that
#             again, with --resume if the run had begun to write. Given again while its run is
#             going, it follows that
#
# Flags, of which each command uses what it needs:
#   --name NAME            of the slice
#   --zone ZONE            where it is
#   --project PROJECT      whose it is (default: gcloud's)
#   --type TYPE            accelerator type, as v5litepod-16 (for up, run)
#   --version VERSION      runtime version, as v2-alpha-tpuv5-lite (for up, run)
#   --spot                 cheaper, and may be preempted (default: on demand)
#   --queued               as a queued resource of the same name: wait in line for capacity (for up,
#                          run, down)
#   --create-arg=ARG       one more argument of gcloud's create, as --create-arg=--network=NET;
#                          may be repeated
#   --connect-arg=ARG      the same for gcloud's ssh and scp, as --connect-arg=--internal-ip
#   --alpha                use `gcloud alpha`, whose ssh knows --tunnel-through-iap
#   --source DIR           git checkout to install; tracked files alone are sent (default: this one)
#   --repo URL             install from a git repository that the hosts can read, instead
#   --ref REF              branch, tag or commit (default: the checkout as it is, edits included; of
#                          --repo, its default branch)
#   --extras LIST          extras of loft-jax, with commas (default: tpu)
#   --setup COMMAND        shell command that install runs first, on all hosts
#   --worker N             host that logs and run follow (default: 0)
#   --max-restarts N       how often run goes on when it was cut off (default: 20)
#   --stop-timeout SECONDS for a run to end (default: 900)
#   --poll SECONDS         between questions to gcloud (default: 15)
#   --dry-run              print the commands for a new slice, one a line, and run none
#
# Several hosts need the key in ssh-agent: ssh-add ~/.ssh/google_compute_engine. Environment
# variables of the run, such as HF_TOKEN, are lines NAME=VALUE in ~/loft-jax/env on the hosts, which
# --setup can write; nothing secret is sent from here.
#
# Exit status: 0; 2 for a wrong command line; 4 if another run is going; for logs and run, that of
# the run (130: stopped, with a checkpoint); 1 for all else.

set -euo pipefail
exec 3>&1 # takes what --dry-run prints, also inside of $(...) and of pipes

readonly CONNECT_TRIES=3
readonly SETTLE_POLLS=4
readonly WAIT_FOR=' CREATING STARTING RESTARTING REIMAGING REPAIRING STOPPING DELETING UNKNOWN '
readonly WAIT_FOR_QUEUED=\
' CREATING ACCEPTED WAITING_FOR_RESOURCES PROVISIONING ACTIVE SUSPENDING DELETING UNKNOWN '

# The flags.
name='' zone='' project='' type='' version='' source='' repo='' ref='' setup=''
extras=tpu worker=0 max_restarts=20 stop_timeout=900 poll=15
spot=false queued=false alpha=false dry_run=false
create_args=() connect_args=() run_args=()

command=''         # the first word
place=()           # flags of gcloud that say where the slice is
work=''            # folder for what does not outlive this script
imagined=ABSENT    # state of the slice in a dry run
fresh=false        # whether the slice was created just now
run_id='' run_state='' run_status='' run_stopped='' # what a host says of its run
mode=launch        # how `run` starts the run
outcome=''         # status of a run that has ended for good

note() { [[ $dry_run == true ]] || printf 'tpu_pod: %s\n' "$*" >&2; }

die() {
  printf 'tpu_pod: %s\n' "$*" >&2
  exit 1
}

refuse() {
  printf 'tpu_pod: %s; see tpu_pod.sh --help\n' "$*" >&2
  exit 2
}

usage() { sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

# --- the command line ---

parse() {
  local flag value inline
  while (($#)); do
    flag=$1 value='' inline=false
    if [[ $flag == --?*=* ]]; then
      value=${flag#*=} flag=${flag%%=*} inline=true
    fi
    case $flag in
      --)
        shift
        run_args=("$@")
        return
        ;;
      -h | --help)
        usage
        exit
        ;;
      --spot | --queued | --alpha | --dry-run)
        [[ $inline == false ]] || refuse "$flag takes no value"
        flag=${flag#--}
        printf -v "${flag//-/_}" true
        ;;
      --name | --zone | --project | --type | --version | --source | --repo | --ref | --extras | \
        --setup | --worker | --max-restarts | --stop-timeout | --poll | \
        --create-arg | --connect-arg)
        if [[ $inline == false ]]; then
          [[ $# -gt 1 && $2 != --* ]] || refuse "$flag: its value is missing, expected $flag=VALUE"
          value=$2
          shift
        fi
        [[ $value ]] || refuse "$flag: its value is empty"
        case $flag in
          --create-arg) create_args+=("$value") ;;
          --connect-arg) connect_args+=("$value") ;;
          *)
            flag=${flag#--}
            printf -v "${flag//-/_}" %s "$value"
            ;;
        esac
        ;;
      -*) refuse "unknown flag $flag" ;;
      *)
        [[ -z $command ]] || refuse "unexpected word $flag after $command"
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
  [[ $extras =~ ^[A-Za-z0-9,_-]+$ ]] || refuse "--extras is $extras, expected names with commas"
  [[ -z $source || -z $repo ]] || refuse '--source and --repo are both given, expected one'
  if [[ -z $repo && ($command == install || $command == run) ]]; then
    [[ $source ]] || source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    [[ -e $source/.git ]] || refuse "--source: $source is no git checkout; --repo needs none"
  fi
  [[ $ref != -* ]] || refuse "--ref is $ref, expected a branch, tag or commit"
  case $command in
    launch | resume | run)
      ((${#run_args[@]})) || refuse 'the flags of loft-jax finetune are missing after --'
      ;;
    *) ((${#run_args[@]} == 0)) || refuse "$command takes nothing after --" ;;
  esac
}

# --- running commands, or printing them ---

# Words as a shell reads them, on one line.
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

tpus() {
  if [[ $alpha == true ]]; then
    execute gcloud alpha compute tpus "$@"
  else
    execute gcloud compute tpus "$@"
  fi
}

pause() { [[ $dry_run == true ]] || sleep "$poll"; }

# Runs a command in the shell of one host, or of all. When a connection fails, gcloud runs it again,
# and so does this: every command must bear that.
remote() { # WORKER COMMAND
  local tries=0 code
  while true; do
    code=0
    remote_once "$@" || code=$?
    ((code == 255 && ++tries < CONNECT_TRIES)) || return "$code" # 255 is of ssh itself
    note "no connection to $name; trying again"
    pause
  done
}

remote_once() { # WORKER COMMAND
  # Without keepalive, a connection to a host that was preempted hangs.
  tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --quiet \
    --ssh-flag='-o ServerAliveInterval=15 -o ServerAliveCountMax=4' \
    ${connect_args[@]+"${connect_args[@]}"} --command="$2"
}

# --- the slice ---

# State of the slice or of its queued resource; ABSENT if there is none.
describe() { # KIND FIELD
  local tries=0 state
  while true; do
    if state=$(tpus "$1" describe "$name" "${place[@]}" --format="value($2)" 2>"$work/error"); then
      [[ $dry_run == false ]] || state=$imagined
      printf '%s\n' "${state:-UNKNOWN}"
      return
    fi
    if grep -q NOT_FOUND "$work/error"; then
      echo ABSENT
      return
    fi
    if ((++tries == CONNECT_TRIES)); then
      cat "$work/error" >&2
      die "cannot tell the state of $name"
    fi
    pause
  done
}

create() {
  local words
  if [[ $queued == true ]]; then
    words=(queued-resources create "$name" --node-id="$name" --runtime-version="$version")
  else
    words=(tpu-vm create "$name" --version="$version")
  fi
  words+=("${place[@]}" --accelerator-type="$type" --quiet)
  [[ $spot == false ]] || words+=(--spot)
  note "creating $name"
  if ! tpus "${words[@]}" ${create_args[@]+"${create_args[@]}"} 2>&1 1>&3 |
    tee "$work/error" >&2; then
    grep -qi 'no more capacity' "$work/error" || die "cannot create $name"
    note "asking again in $poll s; --queued waits in line instead"
    pause
  fi
  imagined=READY
}

delete() {
  if [[ $queued == true ]]; then
    tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

# Deletes what a preemption has left.
delete_lost() { # STATE
  local queue
  note "$name is $1; deleting it"
  if [[ $queued == true ]]; then
    queue=$(describe queued-resources state.state) || exit
    if [[ $queue == ABSENT ]]; then # the slice was created without --queued
      queued=false delete || die "cannot delete $name"
      return
    fi
  fi
  delete || die "cannot delete $name"
}

# Waits for a slice that is READY; creates it if need be.
bring_up() {
  local state expected shown=''
  fresh=false
  while true; do
    state=$(describe tpu-vm state) || exit
    expected=$WAIT_FOR
    if [[ $state == ABSENT && $queued == true ]]; then
      state=$(describe queued-resources state.state) || exit
      expected=$WAIT_FOR_QUEUED
    fi
    case $state in
      READY)
        note "$name is READY"
        return
        ;;
      ABSENT)
        create
        fresh=true
        ;;
      PREEMPTED | TERMINATED | SUSPENDED) delete_lost "$state" ;;
      *)
        [[ $expected == *" $state "* ]] ||
          die "$name is $state, expected READY; down deletes it, if nothing else helps"
        [[ $state == "$shown" ]] || note "$name is $state; waiting"
        shown=$state
        pause
        ;;
    esac
  done
}

# Whether the slice went away. Its state lags behind the end of its hosts.
slice_lost() {
  local i state
  for ((i = 0; i < SETTLE_POLLS; i++)); do
    ((i == 0)) || pause
    state=$(describe tpu-vm state) || exit
    [[ $state == READY ]] || return 0
  done
  return 1
}

# --- the run, on the hosts ---

# ~/loft-jax on a host holds venv and env, and of the run: run.id, run.pid, run.log, run.status once
# it has ended, run.stopped once it was told to. Commands are one line, as --dry-run prints lines.
# shellcheck disable=SC2016  # for the shell of the host, as all below
readonly PRELUDE='mkdir -p ~/loft-jax && cd ~/loft-jax || exit 1; '\
'going() { [ -s run.pid ] && grep -qs loft-jax "/proc/$(cat run.pid)/cmdline"; }; '
# A run that was killed with its host leaves no status; one that has just ended is about to.
# shellcheck disable=SC2016
readonly STATE='state() { if going; then echo running; elif [ -e run.id ]; then '\
'[ -s run.status ] || sleep 1; if [ -s run.status ]; then '\
'echo "ended $(cat run.status)$([ ! -e run.stopped ] || echo " stopped")"; '\
'else echo lost; fi; else echo none; fi; }; '
# shellcheck disable=SC2016
readonly REFUSE_GOING='if going; then echo "a run is going on $(hostname)" >&2; exit 4; fi; '

# Packs tracked files alone: what else lies in a checkout may be secret.
send_source() {
  local commit=$ref archive=$work/loft-jax-source.tar.gz tries=0
  if [[ -z $commit ]]; then # the edits, as a commit on no branch; nothing if there are none
    commit=$(execute git -C "$source" stash create) || die "cannot read the edits in $source"
  fi
  execute git -C "$source" archive --format=tar.gz --prefix=loft-jax/ --output="$archive" \
    "${commit:-HEAD}" || die "cannot pack $source"
  note "sending $source"
  until tpus tpu-vm scp "$archive" "$name:" "${place[@]}" --worker=all --quiet \
    ${connect_args[@]+"${connect_args[@]}"}; do
    ((++tries < CONNECT_TRIES)) || return 1
    pause
  done
}

install_all() {
  local requirement script
  if [[ $fresh == false ]]; then # a run breaks when its package is replaced
    remote all "$PRELUDE$REFUSE_GOING" || return
  fi
  if [[ $setup ]]; then
    note "running --setup on $name"
    remote all "$setup" || return
  fi
  if [[ $repo ]]; then
    requirement=$(quote "loft-jax[$extras] @ git+$repo${ref:+@$ref}")
  else
    send_source || return
    requirement="\"loft-jax[$extras] @ file://\$HOME/loft-jax-source.tar.gz\""
  fi
  # Images may have too old a Python, or one without ensurepip: uv then brings another. pip keeps an
  # installed package of the same version, whatever is in it, hence uninstall.
  # shellcheck disable=SC2016
  script='set -e; if [ ! -x venv/bin/pip ]; then rm -rf venv; '\
'for python in python3.13 python3.12 python3.11 python3; do '\
'if "$python" -c "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; '\
'then "$python" -m venv venv; break; fi; done; fi; '\
'if [ ! -x venv/bin/pip ]; then '\
'curl -LsSf https://astral.sh/uv/install.sh | env UV_UNMANAGED_INSTALL="$PWD/uv" sh; '\
'uv/uv venv --seed --python 3.12 venv; fi; '\
'venv/bin/pip uninstall -q -y loft-jax; venv/bin/pip install -q '
  note "installing loft-jax on $name"
  remote all "$PRELUDE$script$requirement"
}

given() { # WORD: whether the run has it among its flags
  local word
  for word in "${run_args[@]}"; do
    [[ $word != "$1" ]] || return 0
  done
  return 1
}

# The folder that the run writes to, if its flags tell.
output_folder() {
  local word before='' found=''
  for word in "${run_args[@]}"; do
    [[ $before != --output ]] || found=$word
    [[ $word != --output=* ]] || found=${word#*=}
    before=$word
  done
  printf '%s' "$found"
}

# The same for the same flags of the run, --resume apart.
fingerprint() {
  local word sum=''
  for word in "${run_args[@]}"; do
    [[ $word == --resume ]] || sum+=$(quote "$word")' '
  done
  sum=$(cksum <<<"$sum")
  printf '%s' "${sum%% *}"
}

# Starts the run on all hosts: launch; resume; or auto, which resumes if there is something to.
# By setsid and nohup, which every image has and which need no login: tmux may be missing, and what
# systemd-run --user starts ends with the last connection unless lingering is on.
start_all() { # MODE
  local how=$1 id output script words=(finetune "${run_args[@]}")
  output=$(output_folder)
  if given --resume; then
    how=launch
  elif [[ $how == resume || ($how == auto && -z $output) ]]; then
    words+=(--resume)
  fi
  # All are asked before one is started: the run of a host must not meet another on the next.
  remote all "$PRELUDE$REFUSE_GOING" || return
  # By the id, a host knows that it has done this before, and the connection failed after it.
  id=$(fingerprint)-$(date +%s)-$$
  script="if [ \"\$(cat run.id 2>/dev/null)\" = $id ]; then exit 0; fi; $REFUSE_GOING"
  script+='[ -x venv/bin/loft-jax ] || { echo "loft-jax is not installed" >&2; exit 1; }; '
  script+="set -- $(quote "${words[@]}"); "
  if [[ $how == auto && $output ]]; then # lost before it wrote anything, it starts again
    script+="if [ -e $(quote "$output/config.yaml") ]; then set -- \"\$@\" --resume; fi; "
  fi
  # shellcheck disable=SC2016
  script+='rm -f run.pid run.status run.stopped; '\
'if [ -e run.log ]; then mv run.log run.log.old; fi; '\
'if [ -e env ]; then set -a; . ./env; set +a; fi; '"echo $id > run.id; "\
'setsid nohup bash -c '\''venv/bin/loft-jax "$@" & echo $! > run.pid; wait $!; '\
'echo $? > run.status'\'' loft-jax "$@" > run.log 2>&1 < /dev/null & '\
'until [ -s run.pid ]; do sleep 0.1; done'
  note "starting loft-jax finetune on $name"
  remote all "$PRELUDE$script"
}

# Asks a host for its run: run_state is running, ended, lost or none.
ask_run() { # WORKER
  local line
  # shellcheck disable=SC2016
  line=$(remote "$1" \
    "$PRELUDE$STATE"'echo "$(cat run.id 2>/dev/null || echo -) $(state)"') || return
  [[ $dry_run == false ]] || line='- ended 0'
  read -r run_id run_state run_status run_stopped <<<"${line##*$'\n'}"
}

# Shows the log of a host until its run has ended, across lost connections.
follow() { # WORKER
  local code script tries=0
  : >"$work/log"
  while true; do
    # From the byte after those that were shown; --pid ends with that process.
    # shellcheck disable=SC2016
    script='if going; then exec tail -f -c +FROM --pid="$(cat run.pid)" run.log; fi; '\
'if [ -e run.log ]; then exec tail -c +FROM run.log; fi'
    script=${script//FROM/$(($(wc -c <"$work/log") + 1))}
    code=0
    remote_once "$1" "$PRELUDE$script" | tee -a "$work/log" || code=$?
    ask_run "$1" || return
    if [[ $run_state != running ]] && ((code == 0 || ++tries == CONNECT_TRIES)); then
      return 0
    fi
    pause
  done
}

# The status of a host whose run failed by itself. Nothing if one was killed (137), or all ended
# since another did (3; 134 where JAX saw it first): then it is worth another try.
own_failure() {
  local states state code found=''
  # shellcheck disable=SC2016
  states=$(remote all "$PRELUDE$STATE"'state') || return 0
  while read -r state code _; do
    case $state:$code in
      lost:*) return 0 ;;
      ended:0 | ended:3 | ended:130 | ended:134 | ended:137 | ended:143) ;;
      ended:*) found=$code ;;
    esac
  done <<<"$states"
  printf '%s' "$found"
}

await_end() {
  # shellcheck disable=SC2016
  remote all "${PRELUDE}n=0; while going; do [ \$n -lt $stop_timeout ] || exit 5; "\
'sleep 1; n=$((n + 1)); done'
}

# --- commands ---

# Ends for the status that hosts gave: 4 says that a run is going there.
failed() { # STATUS COMMAND
  (($1 != 4)) || exit 4
  die "cannot $2 on all hosts of $name"
}

install_and_start() { # MODE
  install_all && start_all "$1"
}

logs() {
  follow "$worker" || die "cannot reach host $worker of $name"
  case $run_state in
    ended)
      note "the run has ended with status $run_status"
      exit "$run_status"
      ;;
    lost) die 'the run was killed, or its host restarted; resume goes on with it' ;;
    *) die "no run was launched on $name" ;;
  esac
}

status() {
  local state
  state=$(describe tpu-vm state) || exit
  [[ $dry_run == true ]] || echo "$name: $state"
  if [[ $state == READY || $dry_run == true ]]; then
    # shellcheck disable=SC2016
    remote all "$PRELUDE$STATE"'echo "$(hostname): $(state)"'
  fi
}

stop() {
  # The mark: a second signal would end the run without a checkpoint. The signal alone first: hosts
  # save together, so that none may be waited for before all were told.
  # shellcheck disable=SC2016
  remote all "$PRELUDE"'if going && [ ! -e run.stopped ]; then touch run.stopped; '\
'kill -TERM "$(cat run.pid)"; fi' || die "cannot reach all hosts of $name"
  note "waiting for the run on $name to save a checkpoint and end"
  await_end || die "the run on $name has not ended within $stop_timeout s"
}

# One stretch of `run`: until the run has ended, or, with an empty outcome, its slice is lost.
stretch() {
  local code=0
  outcome='' run_state=none
  bring_up
  if [[ $fresh == false ]]; then
    if ! ask_run "$worker"; then
      slice_lost || die "cannot reach host $worker of $name"
      return 0
    fi
    if [[ $run_state == running ]]; then
      if [[ ${run_id%%-*} != "$(fingerprint)" ]]; then
        note "another run is going on $name"
        exit 4
      fi
      note 'this run is going already'
    elif [[ $mode != launch ]]; then # hosts take a while to notice that others are gone
      await_end || note "the run on $name has not ended everywhere"
    fi
  fi
  if [[ $run_state != running ]]; then
    install_and_start "$mode" || code=$?
    if ((code)); then
      ((code != 4)) || exit 4
      slice_lost || die "cannot start on all hosts of $name; stop ends the run where it is going"
      return 0
    fi
  fi
  mode=auto
  if ! follow "$worker"; then
    slice_lost || die "cannot reach host $worker of $name; run, again, follows a run that is going"
    return 0
  fi
  case $run_state:$run_status:$run_stopped in
    ended:0: | ended:*:stopped) outcome=$run_status ;;
    # Killed, or stopped but not by `stop`: a host went down, and may take the slice with it.
    lost:* | none:* | ended:130: | ended:143:) slice_lost || true ;;
    *) slice_lost || outcome=$(own_failure) ;;
  esac
}

run() {
  local restarts=0
  while true; do
    stretch
    [[ -z $outcome ]] || break
    ((++restarts <= max_restarts)) || die "the run was cut off more than $max_restarts times"
    note "the run was cut off; going on ($restarts of at most $max_restarts)"
    pause
  done
  note "the run has ended with status $outcome; the slice is still there, down deletes it"
  exit "$outcome"
}

main() {
  parse "$@"
  check
  place=(--zone="$zone")
  [[ -z $project ]] || place+=(--project="$project")
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  case $command in
    up) bring_up ;;
    install)
      install_all || failed $? install
      ;;
    launch | resume)
      start_all "$command" || failed $? "$command"
      ;;
    logs)
      trap 'note "the run goes on"; exit 130' INT
      logs
      ;;
    status) status ;;
    stop) stop ;;
    down) delete ;;
    run)
      trap 'note "a run that was started goes on: run follows it again, stop ends it"; exit 130' INT
      run
      ;;
  esac
}

main "$@"
