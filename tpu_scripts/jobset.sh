#!/usr/bin/env bash
# Writes the manifest of the run as a GKE JobSet and applies it. The cluster needs the JobSet controller
# (https://jobset.sigs.k8s.io) and a node pool of the slice's type; REPOSITORY is a public git URL of this project.
#
#   ./jobset.sh [--dry-run]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ -n "$REPOSITORY" ] || fail "set REPOSITORY to a git URL that the cluster can read"

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $OBJECT
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 3
    rules:
      # Preemption is no failure of the run: begin again from the checkpoint, as often as it takes.
      - action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [75, 134]
              - action: FailJob
                onPodConditions:
                  - type: DisruptionTarget
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $NODE
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
YAML
  if [ "$SPOT" = 1 ]; then
    cat <<YAML
                cloud.google.com/gke-spot: "true"
              tolerations:
                - key: cloud.google.com/gke-spot
                  operator: Equal
                  value: "true"
                  effect: NoSchedule
YAML
  fi
  if [ -n "$SERVICE_ACCOUNT" ]; then
    echo "              serviceAccountName: $SERVICE_ACCOUNT"
  fi
  cat <<YAML
              containers:
                - name: train
                  image: $IMAGE
                  resources:
                    limits:
                      google.com/tpu: $((CHIPS < 4 ? CHIPS : 4))
                  command: [bash, -ec]
                  args:
                    - |
                      git clone --quiet --depth 1 --branch $REVISION $REPOSITORY code
                      cd code
                      pip install --quiet '.[tpu,media]'
                      LIBTPU_INIT_ARGS="\$($FLAGS)"
                      export LIBTPU_INIT_ARGS
                      exec $TRAIN --processes $((HOSTS * SLICES))
YAML
}

if [ "$DRY_RUN" = 1 ]; then
  echo "kubectl apply -f - <<'YAML'"
  manifest
  echo YAML
else
  manifest | kubectl apply -f -
fi
