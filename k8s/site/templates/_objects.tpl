{{/* A claim that the chart makes, unless it is to use another: (list $ component suffix namespace persistence). */}}
{{- define "site.claim" -}}
{{- $root := index . 0 -}}
{{- $persistence := index . 4 -}}
{{- if not $persistence.existingClaim -}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ include "site.claimName" (list $root (index . 2) $persistence) | quote }}
  namespace: {{ index . 3 | quote }}
  labels:
    {{- include "site.labels" (list $root (index . 1)) | nindent 4 }}
  annotations:
    # It outlives the release.
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
{{- end }}
{{- end }}

{{/* A component's service account: (list $ component namespace). */}}
{{- define "site.serviceAccount" -}}
{{- $root := index . 0 -}}
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ include "site.fullname" $root }}-{{ index . 1 }}
  namespace: {{ index . 2 | quote }}
  labels:
    {{- include "site.labels" (list $root (index . 1)) | nindent 4 }}
automountServiceAccountToken: false
{{- end }}

{{/* What a component's service account may do in a namespace: (list $ component namespace namespace-of-account rules). */}}
{{- define "site.role" -}}
{{- $root := index . 0 -}}
{{- $name := printf "%s-%s" (include "site.fullname" $root) (index . 1) -}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: {{ $name }}
  namespace: {{ index . 2 | quote }}
  labels:
    {{- include "site.labels" (list $root (index . 1)) | nindent 4 }}
rules:
  {{- toYaml (index . 4) | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ $name }}
  namespace: {{ index . 2 | quote }}
  labels:
    {{- include "site.labels" (list $root (index . 1)) | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ $name }}
subjects:
  - kind: ServiceAccount
    name: {{ $name }}
    namespace: {{ index . 3 | quote }}
{{- end }}

{{/* Keeps a drain waiting for a component's pod: (list $ component namespace). There is one pod. */}}
{{- define "site.disruptionBudget" -}}
{{- $root := index . 0 -}}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "site.fullname" $root }}-{{ index . 1 }}
  namespace: {{ index . 2 | quote }}
  labels:
    {{- include "site.labels" (list $root (index . 1)) | nindent 4 }}
spec:
  maxUnavailable: 0
  selector:
    matchLabels:
      {{- include "site.selector" (list $root (index . 1)) | nindent 6 }}
{{- end }}
