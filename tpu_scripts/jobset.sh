#!/usr/bin/env bash
# Writes the manifest of the run as a GKE JobSet and applies it. The cluster needs the JobSet controller
# (https://jobset.sigs.k8s.io) and a node pool of the slice's type; REPOSITORY is a git URL of this project that the
# cluster can read, REVISION the commit (the one that is checked out here). The hosts read and write gs:// as the
# Kubernetes account SERVICE_ACCOUNT; MOUNT also mounts the bucket as files. It says first which machines the run takes,
# and asks; --yes agrees.
#
#   ./jobset.sh [--dry-run] [--yes]
# shellcheck disable=SC2034
TAKES=train
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ -n "$REPOSITORY" ] || fail "set REPOSITORY to a git URL that the cluster can read"
REVISION="${REVISION:-$(git -C "$ROOT" rev-parse HEAD)}"
[[ "$REVISION" =~ ^[0-9a-f]{40}$ ]] || fail "REVISION is '$REVISION', expected the 40 digits of a commit: a branch moves"
[ "${#OBJECT}" -le 48 ] || fail "NAME and RUN make the name $OBJECT; Kubernetes has room for 48 characters"
if [ -n "$MOUNT" ] && [[ "$CLUSTER" != */* ]]; then fail "MOUNT needs CLUSTER=LOCATION/NAME: hosts prove there who they are"; fi

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
      # Any other exit code is an error that a restart does not mend, such as that of a config.
      - action: FailJobSet
        onJobFailureReasons: [BackoffLimitExceeded]
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
YAML
  if [ -n "$MOUNT" ]; then
    cat <<YAML
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
YAML
  fi
  cat <<YAML
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
  if [ -n "$MOUNT" ]; then
    cat <<YAML
              volumes:
                - name: bucket
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: $(sed 's|^gs://||; s|/.*||' <<<"$BUCKET")
                      mountOptions: implicit-dirs
                      # Pods in the network of their host prove with these two who they are.
                      hostNetworkPodKSA: "true"
                      identityProvider: https://container.googleapis.com/v1/projects/$PROJECT/locations/${CLUSTER%%/*}/clusters/${CLUSTER#*/}
YAML
  fi
  cat <<YAML
              containers:
                - name: train
                  image: $IMAGE
                  resources:
                    limits:
                      google.com/tpu: $HOST_CHIPS
YAML
  if [ -n "$MOUNT" ]; then
    cat <<YAML
                  volumeMounts:
                    - name: bucket
                      mountPath: $MOUNT
YAML
  fi
  cat <<YAML
                  command: [bash, -ec]
                  args:
                    - |
                      git init --quiet code
                      cd code
                      git fetch --quiet --depth 1 $(printf %q "$REPOSITORY") $REVISION
                      git checkout --quiet FETCH_HEAD
                      pip install --quiet '.[tpu,media]'
                      LIBTPU_INIT_ARGS="\$(python tpu_scripts/flags.py $TPU)"
                      export LIBTPU_INIT_ARGS
                      exec $TRAIN
YAML
}

confirm "apply the JobSet $OBJECT: $MACHINES on node pools of $MACHINE$([ "$SPOT" = 1 ] && echo ', spot')"
if [ "$DRY_RUN" = 1 ]; then
  echo "kubectl apply -f - <<'YAML'"
  manifest
  echo YAML
else
  manifest | kubectl apply -f -
fi
