{{/* What all pods have in common: (list $ serviceAccountName). */}}
{{- define "site.pod" -}}
{{- $root := index . 0 -}}
serviceAccountName: {{ index . 1 }}
automountServiceAccountToken: false
securityContext:
  {{- include "site.podSecurity" $root | nindent 2 }}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* 10001 is the images' own user. */}}
{{- define "site.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "site.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* What all containers have in common: (list $ image). A failure is one sentence, which the pod's status then shows. */}}
{{- define "site.container" -}}
{{- $image := index . 1 -}}
image: {{ include "site.image" . }}
imagePullPolicy: {{ $image.pullPolicy }}
securityContext:
  {{- include "site.containerSecurity" . | nindent 2 }}
terminationMessagePolicy: FallbackToLogsOnError
{{- end }}

{{/* Where a pod runs: (a component's values). */}}
{{- define "site.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{/*
Whether the process does its work, asked with its own certificate. Often until the first success, rarely afterwards: a
probe is a quarter of a CPU second. What it asks is another process, too, so an outage of that must restart nothing: the
startup probe has 12 hours, and there is no liveness probe. Both processes end by themselves when their work ends.
*/}}
{{- define "site.probes" -}}
startupProbe:
  exec:
    command: [vlafleet, health, --identity, {{ . }}]
  periodSeconds: 5
  timeoutSeconds: 10
  failureThreshold: 8640
readinessProbe:
  exec:
    command: [vlafleet, health, --identity, {{ . }}]
  periodSeconds: 30
  timeoutSeconds: 10
  failureThreshold: 3
{{- end }}

{{/* The init container that takes an identity out of its Secret into the pod's own volume: (list $ image). */}}
{{- define "site.takeIdentity" -}}
- name: identity
  {{- include "site.container" . | nindent 2 }}
  args: [certs, take, /secret, /data/identity]
  env:
    - name: VLAFLEET_LOG_FORMAT
      value: {{ (index . 0).Values.logFormat }}
  resources:
    requests: {cpu: 50m, memory: 128Mi}
    limits: {memory: 256Mi, ephemeral-storage: 128Mi}
  volumeMounts:
    - {name: secret, mountPath: /secret, readOnly: true}
    - {name: data, mountPath: /data}
    - {name: tmp, mountPath: /tmp}
    - {name: home, mountPath: /home/vlafleet}
{{- end }}

{{/* The writable places that end with the pod: (list size-of-tmp size-of-home). */}}
{{- define "site.scratch" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ index . 0 }}
- name: home
  emptyDir:
    sizeLimit: {{ index . 1 }}
{{- end }}

{{/* A claim of the chart's: (list $ component name namespace persistence). It stays when the release goes. */}}
{{- define "site.claim" -}}
{{- $root := index . 0 -}}
{{- $persistence := index . 4 -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ index . 2 }}
  namespace: {{ index . 3 }}
  labels:
    {{- include "site.labels" (list $root (index . 1)) | nindent 4 }}
  annotations:
    helm.sh/resource-policy: keep
    {{- with $persistence.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  accessModes: [ReadWriteOnce]
  {{- with $persistence.storageClass }}
  storageClassName: {{ . }}
  {{- end }}
  resources:
    requests:
      storage: {{ $persistence.size }}
{{- end }}

{{/* A component's service account, which no token is mounted of: (list $ component name namespace). */}}
{{- define "site.serviceAccount" -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ index . 2 }}
  namespace: {{ index . 3 }}
  labels:
    {{- include "site.labels" (list (index . 0) (index . 1)) | nindent 4 }}
automountServiceAccountToken: false
{{- end }}

{{/* A token for the API server, as an admission controller would mount it, but in one container alone. */}}
{{- define "site.tokenVolume" -}}
- name: token
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 3600}
      - configMap:
          name: kube-root-ca.crt
          items: [{key: ca.crt, path: ca.crt}]
      - downwardAPI:
          items: [{path: namespace, fieldRef: {apiVersion: v1, fieldPath: metadata.namespace}}]
{{- end }}
