"""A policy for Ray Serve whose replicas are restored in a moment instead of started in a minute.

Ray's own settings are made for slow starts: it waits 30 s before it starts a replica and 600 s before it stops one. What a
start costs decides both, so this policy is told what it takes:

    autoscaling_config={
        "min_replicas": 0, "max_replicas": 16, "target_ongoing_requests": 8,
        # Ray applies these around every policy.
        "upscale_delay_s": 0, "downscale_delay_s": 0, "downscale_to_zero_delay_s": 0,
        "metrics_interval_s": 0.5, "look_back_period_s": 0.5,
        "policy": {"policy_function": "policy:RestoreAware", "policy_kwargs": {"start_s": 0.4}},
    }

It decides as Rewarm's own policy where Ray's numbers allow it: requests that have no slot start replicas at once, counting
those that are on their way; a replica that is not needed is kept for as long as a few starts would take.
"""

import math


class RestoreAware:
    """Called by Ray's controller for each deployment, ten times a second.

    start_s    what a restore takes, in seconds
    keep       a replica that is not needed is kept for so many starts
    keep_last  the same for the last one, whose absence the next request pays for
    """

    def __init__(self, start_s=1.0, keep=5.0, keep_last=15.0):
        if not (start_s > 0 and keep >= 0 and keep_last >= 0):
            raise ValueError(f"start_s {start_s}, keep {keep}, keep_last {keep_last}: expected times above 0")
        self.keep_s = keep * start_s
        self.keep_last_s = keep_last * start_s

    def __call__(self, context):
        """Gives the number of replicas and what is to be remembered."""
        now = context.current_time
        # Running and queued; replicas that are on their way are in the target already.
        needed = math.ceil(context.total_num_requests / context.config.target_ongoing_requests)
        have = context.target_num_replicas
        state = dict(context.policy_state or {})
        if needed >= have:
            return self._within(context, needed), {"needed_at": now, "needed": needed}
        # What was needed a moment ago is kept until it has been idle for long enough: one step down at a time.
        since = now - state.get("needed_at", now)
        if since < (self.keep_last_s if have == 1 else self.keep_s):
            state.setdefault("needed_at", now)
            return self._within(context, have), state
        return self._within(context, max(needed, have - 1)), {"needed_at": now, "needed": needed}

    @staticmethod
    def _within(context, replicas):
        return max(context.capacity_adjusted_min_replicas, min(context.capacity_adjusted_max_replicas, replicas))
