main_process_ip={{ (launch.main_process_ip or "") | sh }}
if [[ -z $main_process_ip ]]; then
  main_process_ip=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  if ! getent hosts "$main_process_ip" >/dev/null; then # a name that only Slurm knows
    main_process_ip=$(scontrol -o show node "$main_process_ip" | sed 's/.* NodeAddr=\([^ ]*\) .*/\1/')
  fi
fi
