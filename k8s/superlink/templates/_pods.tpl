{{/* What every pod of the release has in common. */}}

{{/* Who a pod runs as, where it may be scheduled: (list $ .Values.superlink "superlink"). */}}
{{- define "superlink.pod" -}}
{{- $ := index . 0 -}}
{{- $component := index . 1 -}}
serviceAccountName: {{ include "superlink.fullname" $ }}-{{ index . 2 }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with $.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- range $field := list "priorityClassName" "nodeSelector" "affinity" "tolerations" "topologySpreadConstraints" }}
{{- with get $component $field }}
{{ dict $field . | toYaml }}
{{- end }}
{{- end }}
{{- end -}}

{{/* A pod template's metadata: (list $ .Values.superlink "superlink"). */}}
{{- define "superlink.podMetadata" -}}
{{- $ := index . 0 -}}
labels:
  {{- include "superlink.podLabels" (list $ (index . 2)) | nindent 2 }}
{{- with (index . 1).podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* A container's image and rights: (list $ .Values.superlink.image). */}}
{{- define "superlink.container" -}}
{{- $image := index . 1 -}}
image: {{ include "superlink.image" . | quote }}
imagePullPolicy: {{ $image.pullPolicy }}
# The one sentence a process ends with is what "kubectl describe" shows.
terminationMessagePolicy: FallbackToLogsOnError
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end -}}

{{/* A container that copies or stores an identity: a quarter of a second of Python, once. */}}
{{- define "superlink.shortResources" -}}
resources:
  requests: {cpu: 100m, memory: 128Mi, ephemeral-storage: 16Mi}
  limits: {memory: 256Mi, ephemeral-storage: 128Mi}
{{- end -}}

{{- define "superlink.env" -}}
- name: VLAFLEET_LOG_FORMAT
  value: {{ .Values.logFormat }}
{{- end -}}

{{/* Where processes renew their certificates: nowhere, if others issue them. */}}
{{- define "superlink.renewingEnv" -}}
{{- include "superlink.env" . }}
{{- if eq (include "superlink.source" .) "authority" }}
- name: VLAFLEET_ENROLMENT
  value: {{ include "superlink.inside" (list . "enrolment") }}
{{- end }}
{{- end -}}

{{/* The writable places of a process; those of a sidecar are its own: "exporter-". */}}
{{- define "superlink.scratchMounts" -}}
- name: {{ . }}tmp
  mountPath: /tmp
- name: {{ . }}home
  mountPath: /home/vlafleet
{{- end -}}

{{/* (list "exporter-" "64Mi" "64Mi"): prefix, size of /tmp, size of the home. */}}
{{- define "superlink.scratch" -}}
- name: {{ index . 0 }}tmp
  emptyDir: {sizeLimit: {{ index . 1 }}}
- name: {{ index . 0 }}home
  emptyDir: {sizeLimit: {{ index . 2 }}}
{{- end -}}

{{/* (list .Values.superlink.persistence "fed-superlink"): the claim that a pod keeps its files on. */}}
{{- define "superlink.claim" -}}
{{- (index . 0).existingClaim | default (index . 1) -}}
{{- end -}}

{{/* Probes of a server, which is asked with its own identity: (list "/data/identity" 9092). */}}
{{- define "superlink.serverProbes" -}}
{{- $command := list "vlafleet" "health" "--identity" (index . 0) "--address" (printf "localhost:%d" (int (index . 1))) | toJson -}}
startupProbe:
  exec:
    command: {{ $command }}
  periodSeconds: 5
  timeoutSeconds: 10
  failureThreshold: 36
readinessProbe:
  exec:
    command: {{ $command }}
  periodSeconds: 30
  timeoutSeconds: 10
  failureThreshold: 3
livenessProbe:
  exec:
    command: {{ $command }}
  periodSeconds: 60
  timeoutSeconds: 10
  failureThreshold: 3
{{- end -}}

{{/* The token of the service account, for the one container that talks to the API server. */}}
{{- define "superlink.tokenVolume" -}}
- name: token
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken:
          path: token
          expirationSeconds: 3600
      - configMap:
          name: kube-root-ca.crt
          items:
            - {key: ca.crt, path: ca.crt}
      - downwardAPI:
          items:
            - path: namespace
              fieldRef: {fieldPath: metadata.namespace}
{{- end -}}

{{- define "superlink.tokenMount" -}}
- name: token
  mountPath: /var/run/secrets/kubernetes.io/serviceaccount
  readOnly: true
{{- end -}}

{{/* A PersistentVolumeClaim, unless there is one: (list $ .Values.superlink.persistence "superlink" "superlink"). */}}
{{- define "superlink.persistentVolumeClaim" -}}
{{- $ := index . 0 -}}
{{- $persistence := index . 1 -}}
{{- if not $persistence.existingClaim -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  {{- include "superlink.metadata" (list $ (index . 2) (index . 3)) | nindent 2 }}
  annotations:
    helm.sh/resource-policy: keep
    {{- with $persistence.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  accessModes: [ReadWriteOnce]
  {{- with $persistence.storageClass }}
  storageClassName: {{ . | quote }}
  {{- end }}
  resources:
    requests:
      storage: {{ $persistence.size }}
{{- end -}}
{{- end -}}

{{/* A server's Service: (list $ .Values.superlink.service "superlink"). */}}
{{- define "superlink.serviceSpec" -}}
{{- $ := index . 0 -}}
{{- $service := index . 1 -}}
{{- $component := index . 2 -}}
type: {{ $service.type }}
# A server that is not ready still knows best what is wrong.
publishNotReadyAddresses: true
{{- with $service.loadBalancerClass }}
loadBalancerClass: {{ . }}
{{- end }}
{{- with $service.loadBalancerSourceRanges }}
loadBalancerSourceRanges:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $service.externalTrafficPolicy }}
externalTrafficPolicy: {{ . }}
{{- end }}
selector:
  {{- include "superlink.selector" (list $ $component) | nindent 2 }}
ports:
  - name: tls
    port: {{ $service.port }}
    targetPort: tls
    protocol: TCP
    {{- with $service.nodePort }}
    nodePort: {{ . }}
    {{- end }}
{{- end -}}
