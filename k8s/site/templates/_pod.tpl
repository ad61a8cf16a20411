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
image: {{ include "site.image" . | quote }}
imagePullPolicy: {{ (index . 1).pullPolicy }}
securityContext:
  {{- include "site.containerSecurity" . | nindent 2 }}
terminationMessagePolicy: FallbackToLogsOnError
{{- end }}

{{/* Where a pod runs, out of a component's values; nothing where they say nothing. */}}
{{- define "site.scheduling" -}}
{{- range $field := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" }}
{{- with get $ $field }}
{{ dict $field . | toYaml }}
{{- end }}
{{- end }}
{{- end }}

{{/* Pods that mount the app's volumes have to be on its node; what else draws them stays: (list $ affinity). */}}
{{- define "site.affinityToApp" -}}
{{- $affinity := deepCopy (index . 1) -}}
{{- $pods := get $affinity "podAffinity" | default dict -}}
{{- $required := get $pods "requiredDuringSchedulingIgnoredDuringExecution" | default list -}}
{{- $labels := include "site.selector" (list (index . 0) "app") | fromYaml -}}
{{- $term := dict "labelSelector" (dict "matchLabels" $labels) "topologyKey" "kubernetes.io/hostname" -}}
{{- $_ := set $pods "requiredDuringSchedulingIgnoredDuringExecution" (append $required $term) -}}
{{- $_ := set $affinity "podAffinity" $pods -}}
{{ toYaml $affinity }}
{{- end }}

{{/*
Whether the process does its work, asked with its own certificate. It asks after its contact with another process, so
there is neither a startup nor a liveness probe: an outage of that one would restart this one. When its work ends, it
ends by itself.
*/}}
{{- define "site.probe" -}}
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
    - {name: VLAFLEET_LOG_FORMAT, value: {{ (index . 0).Values.logFormat }}}
  resources:
    requests: {cpu: 50m, memory: 128Mi}
    limits: {memory: 256Mi, ephemeral-storage: 128Mi}
  volumeMounts:
    - {name: secret, mountPath: /secret, readOnly: true}
    - {name: data, mountPath: /data}
    - {name: tmp, mountPath: /tmp}
    - {name: home, mountPath: /home/vlafleet}
{{- end }}

{{/* The volume that an identity is taken out of; a name. */}}
{{- define "site.secretVolume" -}}
- name: secret
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
{{- end }}

{{/* A token for the API server as Kubernetes would mount it, but into one container alone. */}}
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

{{- define "site.tokenMount" -}}
- {name: token, mountPath: /var/run/secrets/kubernetes.io/serviceaccount, readOnly: true}
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
