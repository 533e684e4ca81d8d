code_dir={{ code_dir | sh }}
script={{ script | sh }}
max_restarts={{ launch.max_restarts }}
max_requeues={{ launch.max_requeues }}

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # requeueing SLURM_JOB_ID could requeue a whole array
job=${job:-$SLURM_JOB_ID}
starts=${SLURM_RESTART_COUNT:-0}
requeues=$((starts + ${1:-0})) # $1: those of the jobs that this one follows up

say() { echo "launcher: $*"; }

if ((requeues > max_requeues)); then
  say "requeued more than launch.max_requeues=$max_requeues times: not started. To go on, submit again"
  exit 75
fi

# ---------------------------------------------------------------- environment

{% if bin_dir %}
export PATH={{ bin_dir | sh }}:$PATH
{% endif %}
{% for name, value in launch.env.items() %}
export {{ name }}={{ value | sh }}
{% endfor %}
{% if launch.setup %}
set -e
trap 'say "launch.setup failed: $BASH_COMMAND"' ERR
{% for line in launch.setup %}
{{ line }}
{% endfor %}
trap - ERR
set +e
{% endif %}
export PYTHONPATH=$code_dir${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 # the snapshot, not what lies in the working directory
export run_dir code_dir job
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-}
[[ -n $SRUN_CPUS_PER_TASK ]] || unset SRUN_CPUS_PER_TASK
export LAUNCHER_SUPERVISED=1         # STOP is ours to remove at the start, and run.json ours to complete
export PET_SIGNALS_TO_HANDLE=SIGHUP  # torchrun leaves SIGTERM ignored, as `node` below sets it
export PET_SHUTDOWN_TIMEOUT=5        # seconds that torchrun gives the other ranks once one has failed
export SLURM_TIME_FORMAT=%s # not the user's own, which the job inherits: seconds since the epoch
end_time=$(squeue -h -j "$job" -o %e)
[[ $end_time =~ ^[0-9]+$ ]] || end_time=${SLURM_JOB_END_TIME:-} # of newer versions; may be empty: it has none
export LAUNCHER_JOB_END_TIME=$end_time

# ---------------------------------------------------------------- what runs on the nodes

stop_reason() { # why Slurm signals this job
  case "$(scontrol -o show job "$job" 2>/dev/null)" in
    *" PreemptTime="[0-9]*) echo preempted ;;
    *" Reason=TimeLimit "*) echo time_limit ;;
    *) echo signal ;;
  esac
}

request_stop() { # the ranks look for STOP at every step, save, and end; the first reason stays
  [[ -e $run_dir/STOP ]] && return
  printf %s "$1" >"$run_dir/slurm/stop.$$" && mv "$run_dir/slurm/stop.$$" "$run_dir/STOP"
}

node() { # on every node: accelerate launch, shielded from signals
  local again=1 code agent threads=${OMP_NUM_THREADS:-$((SLURM_CPUS_ON_NODE / {{ local_processes }}))}
  ((threads > 0)) || threads=1
  on_signal() {
    again=1
    if [[ -e $LAUNCHER_ERROR_DIR/failed ]]; then # srun's own TERM, because another node failed: nothing to save
      kill -KILL "$agent"
    elif ((SLURM_NODEID == 0)); then
      request_stop "$(stop_reason)"
    fi
  }
  trap on_signal TERM INT USR1
  (
    trap '' TERM INT USR1
    exec {{ launch_lines | join(" \\\n      ") }}
  ) &
  agent=$!
  while ((again)); do # a trap interrupts wait
    again=0
    wait "$agent"
    code=$?
  done
  ((code == 0)) || : >"$LAUNCHER_ERROR_DIR/failed"
  exit "$code"
}

sees_output_dir() { # on every node: reads what the first node wrote, and answers
  local tries
  trap '((SLURM_NODEID)) || request_stop "$(stop_reason)"' TERM INT USR1
  for ((tries = 0; tries < 10; tries++)); do
    if [[ $(cat "$proof_dir/token" 2>/dev/null) == "$proof_dir" ]]; then
      hostname >"$proof_dir/node-$SLURM_NODEID" && exit 0
    fi
    sleep 1
  done
  echo "launcher: node ${SLURMD_NODENAME:-$(hostname)} does not see, or cannot write to, output_dir=$run_dir." \
    "All nodes need it on a shared file system: output_dir=/SHARED/…"
  exit 9
}

on_nodes() { # runs a shell function once on every node of the job
  local functions
  functions=$(declare -f stop_reason request_stop "$1")
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" {{ srun_options | map("sh") | join(" ") }} \
    bash -c "$functions; $1"
}

check_nodes() { # every node answers, and proves that it sees the same output_dir
  local code node
  export proof_dir=$run_dir/slurm/nodes-$SLURM_JOB_ID-$starts-$1
  mkdir -p "$proof_dir" && printf %s "$proof_dir" >"$proof_dir/token"
  on_nodes sees_output_dir
  code=$?
  ((code == 9)) && exit 2
  for ((node = 0; code == 0 && node < SLURM_JOB_NUM_NODES; node++)); do
    [[ -s $proof_dir/node-$node ]] && continue
    say "what node $node writes is not in output_dir=$run_dir. All nodes need it on a shared file system"
    exit 2
  done
  rm -rf "$proof_dir"
  if ((code)); then # dead, and Slurm has not noticed yet: it will, before the job starts again
    say "a node of $SLURM_JOB_NODELIST does not answer"
    requeue
  fi
}

# ---------------------------------------------------------------- one start of the ranks, and how it ended

free_port() { # below the range from which the kernel takes ports for outgoing connections
  local port=$((20000 + (SLURM_JOB_ID * 7 + $1) % 10000))
  while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do ((port++)); done
  echo "$port"
}

run_ranks() { # the verdict: finished, pruned, interrupted REASON, unsaved REASON, failed CODE, crashed
  local again=1 code ranks began
  ((requeues + $1)) && export LAUNCHER_RESTARTED=1 # resume_from_checkpoint=never or a path was obeyed at the first start
  export LAUNCHER_ATTEMPT=$SLURM_JOB_ID-$starts-$1
  export LAUNCHER_ERROR_DIR=$run_dir/slurm/attempt-$LAUNCHER_ATTEMPT
  export main_process_port={{ launch.main_process_port or "" }}
  main_process_port=${main_process_port:-$(free_port "$1")}
  mkdir -p "$LAUNCHER_ERROR_DIR"
  began=$(date +%s)
  export LAUNCHER_BEGAN=$began # for the timeline
  on_nodes node &
  ranks=$!
  while ((again)); do
    again=0
    wait "$ranks"
    code=$?
  done
  verdict=$({{ (in_container + ["python3", "-m", "launcher.slurm.outcome"]) | map("sh") | join(" ") }} \
    "$run_dir" --attempt "$LAUNCHER_ATTEMPT" --began "$began" --code "$code")
  rm -rf "$LAUNCHER_ERROR_DIR"
}

job_info() { # scontrol's, and where the controller is away for a while, as soon as it is back
  until scontrol -o show job "$job"; do sleep 10; done
}

ended=75 # of this job: stopped and saved; 1 where the save of a stop failed
requeue() { # the ranks have saved what they could and ended
  local info next
  trap - TERM USR1
  info=$(job_info)
  if [[ $info =~ " Restarts="([0-9]+) ]] && ((BASH_REMATCH[1] > starts)); then
    say "Slurm has requeued job $job"
    exit "$ended"
  fi
  if [[ $info != *" JobState=RUNNING "* && $info != *" Reason=TimeLimit "* ]]; then
    say "job $job was cancelled: not requeued. To go on, submit again"
    exit "$ended"
  fi
  if ((requeues >= max_requeues)); then
    say "launch.max_requeues=$max_requeues is reached: not requeued. To go on, submit again"
    exit "$ended"
  fi
  if scontrol requeue "$job"; then
    say "requeued job $job ($((requeues + 1)) of launch.max_requeues=$max_requeues)"
    sleep 600 # Slurm ends this script; one that ended by itself would count as the end of the job
    exit "$ended"
  fi
  if next=$(env -u SLURM_RESTART_COUNT sbatch --parsable --dependency="afterany:$job" \
    ${SLURM_ARRAY_TASK_ID:+--array="$SLURM_ARRAY_TASK_ID"} "$script" $((requeues + 1))); then
    next=${next%%;*}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
    printf '%s\n' "$next" >"$run_dir/slurm/job_id"
    say "job $job may not be requeued; job $next goes on after it ($((requeues + 1)) of launch.max_requeues=$max_requeues)"
  else
    say "job $job may not be requeued, and no job may follow it. To go on, submit again"
  fi
  exit "$ended"
}

# ---------------------------------------------------------------- the job

say "job $job, start $((requeues + 1)), on $SLURM_JOB_NODELIST, output_dir $run_dir"
on_limit_signal() { # Slurm's own warning comes up to two minutes before the limit, too early for ranks that know the end
  again=1
  ((end_time && end_time - $(date +%s) < 150)) || request_stop time_limit
}
trap on_limit_signal USR1
trap 'again=1; request_stop "$(stop_reason)"' TERM
rm -f "$run_dir/STOP"
check_nodes start
for ((n = 0; ; n++)); do
  # A lock of this job's own is left by ranks that Slurm has ended, maybe on another host.
  grep -qs "\"job_id\": \"$SLURM_JOB_ID\"" "$run_dir/.lock" && rm -f "$run_dir/.lock"
  run_ranks "$n"
  case "$verdict" in
    finished | pruned) say "job $job: $verdict"; exit 0 ;;
    "interrupted stop_file") say "stopped by $run_dir/STOP. To go on, submit again"; exit 75 ;;
    interrupted*) say "stopped and saved: ${verdict#* }"; requeue ;;
    "unsaved stop_file") say "stopped by $run_dir/STOP, and its save failed. To go on, submit again"; exit 1 ;;
    unsaved*) say "stopped, but its save failed: ${verdict#* }"; ended=1; requeue ;;
    failed*) exit "${verdict#* }" ;;
  esac
  [[ $(job_info) == *" JobState=RUNNING "* ]] || requeue
  check_nodes "$n"
  if ((n >= max_restarts)); then
    say "failed after launch.max_restarts=$max_restarts restarts"
    exit 1
  fi
  say "restarting from the last checkpoint ($((n + 1)) of launch.max_restarts=$max_restarts)"
done
