code_dir={{ code_dir | sh }}
script={{ script | sh }}
max_restarts={{ launch.max_restarts }}
max_requeues={{ launch.max_requeues }}

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # requeueing SLURM_JOB_ID could requeue a whole array
job=${job:-$SLURM_JOB_ID}
starts=${SLURM_RESTART_COUNT:-0}
start=$SLURM_JOB_ID-$starts # of this job
requeues=$((starts + ${1:-0})) # $1: those of the jobs that this one follows up
readonly run_dir code_dir script max_restarts max_requeues job starts start requeues # launch.setup must not change them

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
export run_dir first_node=${SLURMD_NODENAME:-$(hostname)}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-}
[[ -n $SRUN_CPUS_PER_TASK ]] || unset SRUN_CPUS_PER_TASK
export SLURM_TIME_FORMAT=%s # not the user's own, which the job inherits: seconds since the epoch
end_time=$(squeue -h -j "$job" -o %e)
[[ $end_time =~ ^[0-9]+$ ]] || end_time=${SLURM_JOB_END_TIME:-} # of newer versions; may be empty: it has none
export LAUNCHER_JOB_END_TIME=$end_time

# ---------------------------------------------------------------- what runs on the nodes

stop_reason() { # why Slurm signals this job
  case "$(scontrol -o show job "$job" 2>/dev/null)" in
    *" PreemptTime="[0-9]*) echo preempted ;;
    *" Reason=TimeLimit "*) echo time_limit ;;
    *) ((end_time && end_time <= $(date +%s))) && echo time_limit || echo signal ;; # Slurm may have no time to answer
  esac
}

request_stop() { # the ranks look for STOP at every step, save, and end; the first reason stays
  [[ -e $run_dir/STOP ]] && return
  printf %s "$1" >"$run_dir/slurm/stop.$$" && mv "$run_dir/slurm/stop.$$" "$run_dir/STOP"
}

on_nodes() { # srun, for one task on every node of the job
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" {{ srun_options | map("sh") | join(" ") }} "$@"
}

check_nodes() { # every node answers, and sees in output_dir what was just written there; the ranks check the other way
  local code
  printf %s "$1" >"$run_dir/slurm/proof" || { say "output_dir=$run_dir cannot be written on $first_node"; exit 1; }
  on_nodes --kill-on-bad-exit=0 bash -c '
    for try in 0 1 2 3 4 5 6 7 8 9; do
      [[ $(cat "$run_dir/slurm/proof" 2>/dev/null) == "$1" ]] && exit 0
      sleep 1
    done
    echo "launcher: output_dir is not the same folder for all nodes: node ${SLURMD_NODENAME:-$(hostname)} does not see" \
      "in output_dir=$run_dir what node $first_node has written in output_dir=$run_dir." \
      "All nodes need it on a shared file system: output_dir=/SHARED/…"
    exit 9' check "$1"
  code=$?
  rm -f "$run_dir/slurm/proof"
  ((code != 9)) || exit 2
  ((code)) || return
  # Ended by SIGTERM, as when the job is preempted; or dead, which Slurm will have noticed before the next start.
  ((code == 143)) && say "stopped before the start" || say "a node of $SLURM_JOB_NODELIST does not answer"
  requeue
}

# ---------------------------------------------------------------- one start of the agents, and how it ended

free_port() { # below the range from which the kernel takes ports for outgoing connections
  local port=$((20000 + (SLURM_JOB_ID * 7 + $1) % 10000))
  while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do ((port++)); done
  echo "$port"
}

run_agents() { # sets `verdict`, see launcher/slurm/node.py, and `code`: 0 where every agent came to an end of its own
  local again=1 agents verdict_file=$run_dir/slurm/verdict port={{ launch.main_process_port or "" }}
  ((requeues + $1)) && export LAUNCHER_RESTARTED=1 # resume_from_checkpoint=never or a path was obeyed at the first start
  export LAUNCHER_BEGAN=$(date +%s) # for the timeline
  printf '%-64s' >"$verdict_file" # room for the word, should the disk be full by then
  on_nodes python3 -m launcher.slurm.node "$run_dir" --job "$job" --start "$start" --verdict "$verdict_file" \
    --main_process_ip "${main_process_ip:-}" --main_process_port "${port:-$(free_port "$1")}" &
  agents=$!
  while ((again)); do # a trap interrupts wait
    again=0
    wait "$agents"
    code=$?
  done
  read -r verdict <"$verdict_file"
  rm -f "$verdict_file"
}

num_restarts() { # inside of this start of the job; the agents count those of their ranks in the same file
  local whose count
  read -r whose count <"$run_dir/slurm/restarts"
  [[ $whose == "$start" && $count =~ ^[0-9]{1,9}$ ]] && echo "$count" || echo 0
} 2>/dev/null

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
check_nodes "$start-0"
for ((n = 0; ; n++)); do
  # A lock of this job's own is left by ranks that Slurm has ended, maybe on another host.
  grep -qs "\"job_id\": \"$SLURM_JOB_ID\"" "$run_dir/.lock" && rm -f "$run_dir/.lock"
  run_agents "$n"
  case "$verdict" in
    finished | pruned) say "job $job: $verdict"; exit 0 ;;
    "interrupted stop_file") say "stopped by $run_dir/STOP. To go on, submit again"; exit 75 ;;
    interrupted*) say "stopped and saved: ${verdict#* }"; requeue ;;
    early*) ((code)) || { say "stopped before the start: ${verdict#* }"; requeue; } ;; # else srun, as another agent failed
    "unsaved stop_file") say "stopped by $run_dir/STOP, and its save failed. To go on, submit again"; exit 1 ;;
    unsaved*) say "stopped, but its save failed: ${verdict#* }"; ended=1; requeue ;;
    failed*) exit "${verdict#* }" ;;
    "") ((code == 143 || code == 138 || code == 130)) && { say "stopped before the start"; requeue; } ;; # not yet a handler
  esac
  [[ $(job_info) == *" JobState=RUNNING "* ]] || requeue
  check_nodes "$start-$((n + 1))"
  restarts=$(num_restarts)
  ((restarts > n)) || restarts=$n
  if ((restarts >= max_restarts)); then
    say "an agent was lost again after launch.max_restarts=$max_restarts restarts"
    exit 1
  fi
  ((++restarts))
  printf '%s %s\n' "$start" "$restarts" >"$run_dir/slurm/restarts"
  say "an agent was lost (srun ended with $code): starting all again ($restarts of launch.max_restarts=$max_restarts)"
done
