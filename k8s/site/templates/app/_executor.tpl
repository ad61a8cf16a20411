{{/*
What the SuperExec makes a task's pod of: Flower's keys (KubernetesExecutorConfig), and "pod-spec", which is merged into
the pod's spec. A task sees data, model and state, and has neither a token of the API server nor a resolver.
*/}}
{{- define "site.executor" -}}
namespace: {{ .Values.app.executor.namespace | quote }}
image: {{ include "site.image" (list . .Values.app.image) | quote }}
image-pull-policy: {{ .Values.app.image.pullPolicy }}
service-account-name: {{ include "site.fullname" . }}-task
# One GPU, one task at a time.
active-pod-budget: 1
capacity-log-interval: 60
labels:
  # Flower sets the component itself.
  {{- omit (include "site.taskPods" . | fromYaml) "app.kubernetes.io/component" | toYaml | nindent 2 }}
  app.kubernetes.io/part-of: vlafleet
  {{- with .Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.app.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
env:
  - {name: VLAFLEET_IDENTITY, value: /identity}
  {{- include "site.trainingEnvironment" . | nindent 2 }}
resources:
  {{- include "site.trainingResources" . | nindent 2 }}
volumes:
  {{- include "site.trainingVolumes" . | nindent 2 }}
volume-mounts:
  - {name: data, mountPath: /identity, subPath: identity, readOnly: true}
  {{- include "site.trainingMounts" . | nindent 2 }}
# Their volumes are mounted on one node at a time.
affinity:
  {{- include "site.affinityToApp" (list . .Values.app.affinity) | nindent 2 }}
{{- with .Values.app.nodeSelector }}
node-selector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.app.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.app.priorityClassName }}
priority-class-name: {{ . }}
{{- end }}
pod-security-context:
  {{- include "site.podSecurity" . | nindent 2 }}
container-security-context:
  {{- include "site.containerSecurity" . | nindent 2 }}
pod-spec:
  enableServiceLinks: false
  shareProcessNamespace: true
  {{- include "site.noResolver" . | nindent 2 }}
  {{- with .Values.app.gpu.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
